"""When an image of a mount is opened and closed. No mount here."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_for_use
from qedfuse.chain.upgrade import make_writable
from qedfuse.errors import InUseError, QedfuseError
from qedfuse.fuse.mounted_image import MountedImage
from qedfuse.fuse.page_cache import TICK
from qedfuse.host.file_id import FileMark
from qedfuse.host.file_storage import FileStorage
from qedfuse.qed.image import Image
from qedfuse.tools.create import create_image
from tests.helpers.mounts.slots import acquire

MIB = 1 << 20


class Openings:
    """Opens real images, for reading and then for writing, and counts; may fail on demand."""

    def __init__(self) -> None:
        self.opened = 0
        self.upgraded = 0
        self.closed = 0
        self.on_open: Exception | None = None
        self.on_upgrade: Exception | None = None
        self.on_close: Exception | None = None
        self.outdated: Image | None = None

    async def open(self, path: str) -> Image:
        if self.on_open is not None:
            raise self.on_open
        image = await open_for_use(path, read_only=True)
        self.opened += 1
        close = image.close

        async def closed() -> None:
            await close()
            self.closed += 1
            if self.on_close is not None:
                raise self.on_close

        image.close = closed  # type: ignore[method-assign]
        return image

    async def upgrade(self, image: Image) -> None:
        if self.on_upgrade is not None:
            raise self.on_upgrade
        await make_writable(image)
        self.upgraded += 1

    async def is_current(self, image: Image) -> bool:
        return image is not self.outdated


Body = Callable[[MountedImage, Openings], Awaitable[None]]


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "disk.qed")
    trio.run(create_image, path, MIB)
    time.sleep(2 * TICK / 1e9)  # so that it is not too new to be relied on
    return path


def run(path: str, body: Body, *, read_only: bool = False, linger: float = 0.0) -> Openings:
    openings = Openings()

    async def main() -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                mounted = MountedImage(
                    path,
                    openings.open,
                    nursery,
                    read_only=read_only,
                    linger=linger,
                    upgrade=openings.upgrade,
                    is_current=openings.is_current,
                )
                await body(mounted, openings)
                await mounted.close()
                assert mounted.opened is None

    trio.run(main)
    assert openings.closed == openings.opened
    return openings


async def until_closed(mounted: MountedImage) -> None:
    for _ in range(2000):
        if not mounted.busy:
            return
        await trio.sleep(0.005)
    raise AssertionError("it stays open")


def test_users_share_one_opening(path: str) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        first = await acquire(mounted, to_write=False)
        assert await acquire(mounted, to_write=True) is first
        mounted.release()
        await trio.sleep(0.05)
        assert mounted.opened is first
        mounted.release()
        await until_closed(mounted)
        assert await acquire(mounted, to_write=False) is not first
        mounted.release()

    assert run(path, body).opened == 2


def test_many_users_at_once(path: str) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        async def use() -> None:
            for _ in range(20):
                image = await acquire(mounted, to_write=True)
                assert mounted.opened is image
                await image.write(0, b"x")
                await trio.lowlevel.checkpoint()
                assert mounted.opened is image
                mounted.release()

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(use)

    run(path, body)


def test_it_lingers(path: str) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        first = await acquire(mounted, to_write=False)
        mounted.release()
        await trio.sleep(0.02)
        assert await acquire(mounted, to_write=False) is first
        mounted.release()

    assert run(path, body, linger=5).opened == 1  # and closing does not wait for it: run has a limit


def test_closing_does_not_wait_for_users(path: str) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        await acquire(mounted, to_write=False)

    assert run(path, body).closed == 1


def test_an_opening_that_fails_can_be_tried_again(path: str) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        openings.on_open = QedfuseError(path, "no")
        for _ in range(2):
            with pytest.raises(QedfuseError, match="no"):
                await acquire(mounted, to_write=False)
            assert not mounted.busy
        openings.on_open = None
        await acquire(mounted, to_write=False)
        mounted.release()

    run(path, body)


@pytest.mark.parametrize("error", [PermissionError(13, "no"), OSError(30, "no"), OSError(1, "no")])
def test_what_may_not_be_written_is_opened_read_only(path: str, error: OSError) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        openings.on_upgrade = error
        image = await acquire(mounted, to_write=True)
        assert not image.writable
        mounted.release()

    assert run(path, body).opened == 1


def test_the_first_writer_has_it_opened_for_writing(path: str) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        image = await acquire(mounted, to_write=False)
        assert not image.writable
        openings.on_upgrade = InUseError(path, "taken")
        with pytest.raises(InUseError):
            await acquire(mounted, to_write=True)
        assert await acquire(mounted, to_write=False) is image
        assert not image.writable
        openings.on_upgrade = None

        async def write(offset: int) -> None:
            assert await acquire(mounted, to_write=True) is image
            await image.write(offset, b"x" * 4096)
            mounted.release()

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(write, number * 4096)
        assert openings.upgraded == 1
        assert await image.read(0, 50_000) == b"x" * 40960 + bytes(9040)
        mounted.release()
        mounted.release()
        await until_closed(mounted)
        image = await acquire(mounted, to_write=False)
        assert not image.writable
        assert await image.read(0, 4096) == b"x" * 4096
        mounted.release()

    run(path, body)


def test_a_read_only_mount_never_opens_for_writing(path: str) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        assert not (await acquire(mounted, to_write=True)).writable
        mounted.release()

    assert run(path, body, read_only=True).upgraded == 0


def test_one_that_is_not_current_is_for_those_who_have_it(path: str) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        first = await acquire(mounted, to_write=True)
        await first.write(0, b"x" * 4096)
        openings.outdated = first
        assert await acquire(mounted, to_write=False) is first
        mounted.release()
        mounted.release()

        async def use() -> None:
            image = await acquire(mounted, to_write=False)
            assert image is not first
            assert await image.read(0, 4096) == b"x" * 4096
            mounted.release()

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(use)

    openings = run(path, body, linger=60)
    assert openings.opened == 2


def test_a_change_that_another_user_has_met_is_not_forgotten(path: str) -> None:
    """That one has the kernel's pages dropped, but goes on with the image as it was opened."""

    async def body(mounted: MountedImage, openings: Openings) -> None:
        first = await acquire(mounted, to_write=False)
        os.chmod(path, 0o600)
        await trio.sleep(2 * TICK / 1e9)
        assert await acquire(mounted, to_write=False) is first
        mounted.cached.may_keep(first)
        mounted.release()
        mounted.release()
        second = await acquire(mounted, to_write=False)
        assert second is not first
        mounted.release()
        assert await acquire(mounted, to_write=False) is second
        mounted.release()

    assert run(path, body, linger=60).opened == 2


def test_one_that_cannot_be_written_is_not_given_up_for_a_current_one(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        first = await acquire(mounted, to_write=True)
        await first.write(0, b"x" * 4096)
        openings.outdated = first
        mounted.release()
        with monkeypatch.context() as patch:
            patch.setattr(FileStorage, "_write_inline", _no_space)
            for _ in range(2):
                assert await acquire(mounted, to_write=False) is first
                mounted.release()
            assert mounted.unwritten is not None
        assert await acquire(mounted, to_write=False) is first
        await first.flush()
        mounted.release()

    openings = run(path, body, linger=60)
    assert openings.opened == 1


def _no_space(self: FileStorage, offset: int, buffers: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [OSError(28, "no space"), ZeroDivisionError()])
def test_a_failed_close_is_remembered(path: str, error: Exception) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        openings.on_close = error
        await acquire(mounted, to_write=True)
        mounted.release()
        await until_closed(mounted)
        assert mounted.failure is not None
        openings.on_close = None
        await acquire(mounted, to_write=True)
        mounted.release()
        await until_closed(mounted)
        assert mounted.failure is None

    run(path, body)


def test_the_file_is_left_with_the_time_that_was_set(path: str) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        image = await acquire(mounted, to_write=True)
        await image.write(0, b"x" * 512)
        mounted.left.mtime_ns = 10**18
        mounted.release()
        await until_closed(mounted)
        status = os.stat(path)
        assert status.st_mtime_ns == 10**18
        assert mounted.left.mark == FileMark.of(status)

    run(path, body)
