"""What was stored into a shared map is data for SEEK_DATA, whether the kernel's writeback cache is on or not."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tests.helpers.cli import qemu_img
from tests.helpers.modes import NEEDS_NATIVE
from tests.helpers.mounts import mounted

MIB = 1 << 20

pytestmark = NEEDS_NATIVE


@pytest.mark.parametrize("options", ["rw", "fixed_size"])
def test_stores_into_a_map_are_no_hole(tmp_path: Path, options: str) -> None:
    image, raw = tmp_path / "disk.qed", tmp_path / "disk.raw"
    raw.touch()
    qemu_img("create", "-q", "-f", "qed", image, "16M")
    with mounted("-o", options, image, raw):
        fd = os.open(raw, os.O_RDWR)
        try:
            with mmap.mmap(fd, 16 * MIB) as view:
                view[8 * MIB : 8 * MIB + 5] = b"hello"
                os.close(fd)
                fd = os.open(raw, os.O_RDONLY)  # a map outlives its descriptor
                assert os.lseek(fd, 0, os.SEEK_DATA) == 8 * MIB
                view[4 * MIB] = 1
                assert os.lseek(fd, 0, os.SEEK_DATA) == 4 * MIB
                assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        finally:
            os.close(fd)
