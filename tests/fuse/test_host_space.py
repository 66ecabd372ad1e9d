"""Preallocating on a host that does not say how much space it has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfuse.chain.opening import open_image
from qedfuse.fuse.fallocate import fallocate
from tests.helpers.images.chains import run
from tests.helpers.mounts.guests import filesystem, need_filesystem, need_guest
from tests.helpers.mounts.modes import MODES, Mode, makes_holes
from tests.helpers.mounts.mounts import mounted
from tests.helpers.qemu.cli import qemu_img

MIB = 1 << 20


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Path]:
    """An image on a host whose statfs reports 0 blocks, all of them in use."""
    need_guest()
    need_filesystem("ramfs")
    with filesystem(Path("none"), tmp_path / "host", "-t", "ramfs") as host:
        assert os.statvfs(host).f_blocks == 0
        qemu_img("create", "-q", "-f", "qed", host / "disk.qed", 16 * MIB)
        yield host / "disk.qed"


def test_preallocating(silent: Path) -> None:
    async def check() -> None:
        async with open_image(silent) as image:
            await fallocate(image, 0, 0, 20 * MIB)
            assert image.size == 20 * MIB

    run(check)


@MODES
def test_through_a_mount(silent: Path, tmp_path: Path, mode: Mode) -> None:
    if not makes_holes(mode):
        pytest.skip("without the fast path there is no fallocate")
    raw = tmp_path / "disk.raw"
    raw.touch()
    with mounted(*mode, silent, raw), raw.open("r+b", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, 20 * MIB)
        assert raw.stat().st_size == 20 * MIB
        file.write(b"x" * MIB)
        os.fsync(file.fileno())
