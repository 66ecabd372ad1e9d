"""An image that is closed is locked no longer, whatever processes were made while it was open."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import trio

from qedfuse.chain.opening import open_image
from qedfuse.chain.upgrade import make_writable
from qedfuse.host import image_lock
from qedfuse.native import _sidecar
from tests.helpers.qemu.cli import qemu_img


def test_locks_last_no_longer_than_a_descriptor(tmp_path: Path) -> None:
    """A child with a copy of the descriptors would hold an image's locks for a moment after it was closed."""
    image, file = tmp_path / "image", tmp_path / "file"
    image.touch()
    file.touch()
    place = os.fsencode(file), file.stat().st_dev, file.stat().st_ino
    ended = threading.Event()
    errands = 0

    def run_errands() -> None:
        nonlocal errands
        while not ended.is_set():
            _sidecar.set_time(*place, 1, 1)
            errands += 1

    thread = threading.Thread(target=run_errands)
    thread.start()
    try:
        opened = 0
        while thread.is_alive() and (opened < 1000 or errands < 200):
            opened += 1
            fd = os.open(image, os.O_RDWR)
            try:
                image_lock.lock(fd, str(image), writable=True)
            finally:
                image_lock.close(fd)
    finally:
        ended.set()
        thread.join()
    assert errands >= 200


def test_a_child_does_not_keep_locks(tmp_path: Path) -> None:
    """Whoever forks while an image is open: a program that uses the library, say."""
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", path, "1M")

    async def main(read_only: bool, upgraded: bool) -> None:
        async with open_image(path, read_only=read_only) as image:
            process = await start()
            if upgraded:
                await make_writable(image)
        try:
            async with open_image(path):
                pass
        finally:
            process.kill()
            await process.wait()

    async def start() -> trio.Process:
        ours = descriptors_of(path)
        assert ours
        return await trio.lowlevel.open_process(["sleep", "60"], pass_fds=ours)

    for read_only, upgraded in ((False, False), (True, False), (True, True)):
        trio.run(main, read_only, upgraded)


def descriptors_of(path: Path) -> list[int]:
    return [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(path)]
