"""Several processes on one raw file, each in its own part of it, do all that can be done to a file, and what they know
of it is compared: with every read, through the mount, and after each unmount and each kill of the daemon, by a new
mount and by QEMU. What was synced must be there after a kill, what was not reads as one of a sector's contents since.

One of them may use a loop device on the raw file, without readahead, and nothing else is left out: the device's page
cache is not the file's, and what it has read ahead of another's part could be written back over what is there by now
(see `Handles`). The others read ahead, the device is read in pieces as large as asked for, through a map page by page.

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

from tests.helpers.judges.parts import PAGE
from tests.helpers.mounts.diff_case import DiffCase
from tests.helpers.mounts.diff_handles import Handles
from tests.helpers.mounts.diff_image import MODES, Counts
from tests.helpers.mounts.guests import loop_device, need_guest
from tests.helpers.mounts.mounts import EXTRA_OPTIONS

SEED = int(os.environ.get("QEDFUSE_DIFFERENTIAL_SEED") or random.SystemRandom().randrange(1 << 32))
#: Seconds of one test: pytest takes one of half an hour for one that hangs.
PART = 900
MEMORY = "/dev/shm"
SECONDS = float(os.environ.get("QEDFUSE_DIFFERENTIAL_SECONDS") or 3600)


#: Those that can be had here.
POSSIBLE = tuple(MODES)
if "--no-fastpath" in EXTRA_OPTIONS or importlib.util.find_spec("qedfuse.native._fastpath") is None:
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


@pytest.mark.parametrize("options", [[], ["--direct-io=on"]], ids=["buffered", "direct"])
def test_who_uses_a_loop_device_changes_only_its_own_pages(tmp_path: Path, options: list[str]) -> None:
    """On a plain file. What the device has in its page cache of others' pages is not written back."""
    need_guest("losetup")
    raw, size = tmp_path / "raw", 512 * PAGE
    raw.write_bytes(b"old." * (size // 4))
    with loop_device(raw, *options) as device:
        others, mine = Handles(str(raw), size, None), Handles(str(device), size, None)
        try:
            for kind in ("plain", "reader"):
                for offset in range(0, size, 16 * PAGE):
                    mine.pread(kind, offset, 16 * PAGE)
            mine.load(0, size)
            for offset in range(0, size, 8 * PAGE):
                others.pwrite("direct", offset, b"new." * (PAGE // 4))
                mine.store(offset + PAGE, b"mine" * (PAGE // 4))
            os.fsync(mine.fd("plain"))
            found = [others.pread("direct", offset, PAGE)[:4] for offset in range(0, size, 8 * PAGE)]
        finally:
            mine.close_all()
            others.close_all()
    assert found == [b"new."] * len(found)
