"""Several processes on one raw file, each in its own part of it, do all that can be done to a file, and what they know
of it is compared: with every read, through the mount, and after each unmount and each kill of the daemon, by a new
mount and by QEMU. What was synced must be there after a kill, what was not reads as one of a sector's contents since.

`QEDFUSE_DIFFERENTIAL_SEED` begins with the image that failed (its seed is printed, and repeats its choices, but not the
timing). The slow test takes an hour, or `QEDFUSE_DIFFERENTIAL_SECONDS`.
"""

from __future__ import annotations

import importlib.util
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.diff_case import DiffCase
from tests.helpers.diff_image import MODES, Counts
from tests.helpers.mounts import EXTRA_OPTIONS

SEED = int(os.environ.get("QEDFUSE_DIFFERENTIAL_SEED") or random.SystemRandom().randrange(1 << 32))
#: Seconds of one test: pytest takes one of half an hour for one that hangs.
PART = 900
MEMORY = "/dev/shm"
SECONDS = float(os.environ.get("QEDFUSE_DIFFERENTIAL_SECONDS") or 3600)


#: Those that can be had here.
POSSIBLE = tuple(MODES)
if "--no-fastpath" in EXTRA_OPTIONS or importlib.util.find_spec("qedfuse._fastpath") is None:
    POSSIBLE = ("python",)


def in_mode(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment must say for it."""
    if mode not in POSSIBLE:
        pytest.skip("--no-fastpath is chosen for all mounts, or the fast path is not built")
    if mode == "pass":
        monkeypatch.setenv("QEDFUSE_FASTPATH", "pass")
    else:
        monkeypatch.delenv("QEDFUSE_FASTPATH", raising=False)


@contextmanager
def host_directory(tmp_path: Path, seed: int) -> Iterator[Path]:
    """One for one image; every fourth in memory, if there is such a file system. What a failure leaves is in
    `tmp_path`."""
    memory = seed % 4 == 0 and os.access(MEMORY, os.W_OK)
    path = Path(tempfile.mkdtemp(prefix=f"differential-{seed}-", dir=MEMORY if memory else tmp_path))
    try:
        yield path
    except BaseException:
        shutil.move(path, tmp_path / "failed")
        raise
    shutil.rmtree(path)


@pytest.mark.parametrize("mode", MODES)
def test_all_that_several_processes_do(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_mode(mode, monkeypatch)
    counts = Counts()
    DiffCase(tmp_path, SEED, mode, counts).run(rounds=3, count=120)
    print(f"figures: {counts}")


@pytest.mark.slow
@pytest.mark.timeout(PART + 600)
@pytest.mark.parametrize("part", range(math.ceil(SECONDS / PART)))
def test_all_that_several_processes_do_for_long(tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts()
    end = time.monotonic() + min(PART, SECONDS - part * PART)
    try:
        while time.monotonic() < end:
            seed = SEED + 10_000 * part + counts.cases
            mode = POSSIBLE[seed % len(POSSIBLE)]
            in_mode(mode, monkeypatch)
            with host_directory(tmp_path, seed) as directory:
                DiffCase(directory, seed, mode, counts).run(rounds=6, count=300)
    finally:
        print(f"figures: {counts}")
