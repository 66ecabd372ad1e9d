"""Tests of the fast path that hold with or without it: three modes, and what QEMU reads after each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qedfuse.host.file_storage import _fallocate
from tests.helpers.mounts.mounts import EXTRA_OPTIONS
from tests.helpers.qemu.cli import qemu_img

CLUSTER = 64 << 10
MODES = ["on", "off", "pass"]

#: The mark of a module that uses `mode`.
MODES_ARE_CHOSEN_HERE = pytest.mark.skipif(
    "--no-fastpath" in EXTRA_OPTIONS or "QEDFUSE_FASTPATH" in os.environ, reason="the modes are chosen here"
)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The fast path answers, is not there, or lets every request through."""
    name = str(request.param)
    if name == "pass":
        monkeypatch.setenv("QEDFUSE_FASTPATH", "pass")
    return name


def words(mode: str) -> list[str]:
    """A mode's, for `mounted`."""
    return ["--no-fastpath"] if mode == "off" else []


def flat(image: Path) -> bytes:
    """What QEMU reads."""
    target = image.with_suffix(".flat")
    qemu_img("convert", "-U", "-f", "qed", "-O", "raw", image, target)
    return target.read_bytes()


def run_fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2) on the raw file, which Python lacks. Raises OSError."""
    _fallocate(fd, mode, offset, size)
