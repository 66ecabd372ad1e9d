"""What was stored into a shared map is data for SEEK_DATA, whether the kernel's writeback cache is on or not."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_image
from tests.helpers.doubles.request import NotedRequest, no_opener
from tests.helpers.mounts.modes import NEEDS_NATIVE
from tests.helpers.mounts.mounts import mounted
from tests.helpers.mounts.slots import slot_of
from tests.helpers.qemu.cli import qemu_img

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


def test_a_seek_for_which_there_is_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is needed to have the kernel's pages written: the caller is told to come again."""
    from qedfuse.fuse.bypass import HandOver

    def no_thread(*_args: object, **_options: object) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        async with open_image(image) as engine, trio.open_nursery() as nursery:
            monkeypatch.setattr(trio.to_thread, "run_sync", no_thread)
            hand_over = HandOver(
                nursery, {1: slot_of(engine)}, lambda _slot: True, (lambda: None, lambda: None), no_opener
            )
            request = NotedRequest()
            assert not hand_over.seek(request, 1, 0, os.SEEK_DATA)
            with trio.fail_after(20):
                assert await request.replied() == errno.EAGAIN
            assert request.invalidated == []

    image = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", image, "16M")
    trio.run(main)
