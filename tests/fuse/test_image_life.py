"""What happens between the last use of an image in a directory mount and the next one, and when an upgrade fails."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import trio

from qedfuse.chain import upgrade
from qedfuse.chain.opening import open_for_use, open_image
from qedfuse.chain.upgrade import make_writable
from qedfuse.errors import InUseError
from qedfuse.fuse import tree as tree_module
from qedfuse.fuse.image_slot import ImageSlot
from qedfuse.fuse.mounted_image import MountedImage
from qedfuse.fuse.node import Node
from qedfuse.fuse.tree import Tree
from qedfuse.host import lookups as threads
from qedfuse.host.file_id import FileId, FileMark
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.lookups import NoAnswerError
from qedfuse.qed.image import Image
from qedfuse.tools.create import create_image
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.guests import filesystem
from tests.helpers.mounts.injection import injected
from tests.helpers.mounts.modes import MODES, Mode
from tests.helpers.mounts.mounts import mounted, until_closed, wait_for_exit
from tests.helpers.mounts.slots import acquire, slot_of
from tests.helpers.qemu.cli import new_image

MIB = 1 << 20


@contextmanager
def read_by_qemu(image: Path) -> Iterator[None]:
    command = ["qemu-io", "-r", "-f", "qed", str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"read 0 512\n")
        process.stdin.flush()
        assert b"read" in process.stdout.readline()
        try:
            yield
        finally:
            process.stdin.close()


# -- at the mount -----------------------------------------------------------------------------------------------------


def test_an_open_that_is_refused_drops_no_pages_and_the_next_one_does(source: Path, point: Path) -> None:
    """What the refused one saw is not forgotten, however long the next one takes to come."""
    base = source / "base"
    base.write_bytes(b"\1" * MIB)
    image, raw = new_image(source / "top.qed", "1M", "-b", "base", "-F", "raw"), point / "top.raw"
    with mounted(source, point):
        for _ in range(2):
            assert raw.read_bytes() == b"\1" * MIB
            until_closed(point)
        base.write_bytes(b"\2" * MIB)
        with read_by_qemu(image), raises_errno(errno.EBUSY):
            os.open(raw, os.O_RDWR)
        time.sleep(1.2)
        until_closed(point)
        assert raw.read_bytes() == b"\2" * MIB


def test_an_image_that_was_overwritten_right_after_it_was_read(source: Path, point: Path) -> None:
    """By a tool without locks: it has another size, and the kernel must not keep the old one."""
    image, raw = new_image(source / "a.qed"), point / "a.raw"
    larger = new_image(source.parent / "larger.qed", "2M")
    with mounted(source, point):
        assert len(raw.read_bytes()) == MIB
        shutil.copyfile(larger, image)
        time.sleep(0.1)
        with raw.open("r+b", buffering=0) as file:
            file.write(b"x" * 4096)
            os.fsync(file.fileno())
        until_closed(point)
        assert raw.read_bytes() == b"x" * 4096 + bytes(2 * MIB - 4096)


def fill_with_time(raw: Path) -> None:
    raw.write_bytes(b"x" * MIB)
    os.utime(raw, (1e9, 1e9))


@pytest.mark.parametrize("over_file", [False, True], ids=["directory", "file"])
def test_the_time_that_was_set_outlives_the_mount(source: Path, point: Path, over_file: bool) -> None:
    image, raw = new_image(source / "a.qed"), point / "a.raw"
    if over_file:
        raw.touch()
    with mounted(*((image, raw) if over_file else (source, point))) as mount:
        pid = mount.pid()
        fill_with_time(raw)
        subprocess.run(["fusermount3", "-u", str(mount.point)], check=True)  # before it is closed
        wait_for_exit(pid)
    assert image.stat().st_mtime == 1e9


@MODES
def test_one_that_was_renamed_and_then_replaced_cannot_be_synced(source: Path, point: Path, mode: Mode) -> None:
    image, new = new_image(source / "a.qed"), new_image(source.parent / "new.qed")
    with mounted(*mode, source, point), (point / "a.raw").open("r+b", buffering=0) as file:
        image.rename(source / "b.qed")
        file.write(b"x" * 4096)
        os.fsync(file.fileno())
        new.rename(source / "b.qed")
        file.write(b"y" * 4096)
        with raises_errno(errno.ESTALE):
            os.fsync(file.fileno())


def test_an_image_in_use_does_not_disturb_one_that_has_failed(source: Path, point: Path) -> None:
    new_image(source / "a.qed")
    other = new_image(source / "b.qed")
    with mounted(source, point) as mount:
        fd = os.open(point / "a.raw", os.O_RDWR)
        os.pwrite(fd, b"x" * 4096, 0)
        with injected(mount.pid(), "fdatasync:error=EIO"), raises_errno(errno.EIO):
            os.fsync(fd)
        with raises_errno(errno.EIO):
            os.close(fd)
        with read_by_qemu(other):
            for _ in range(2):
                with raises_errno(errno.EBUSY):
                    os.open(point / "b.raw", os.O_RDWR)
        assert (point / "a.raw").read_bytes()[:1] == b"x"
        mount.umount()


def test_what_cannot_be_written_needs_no_lock_of_a_writer(source: Path, point: Path) -> None:
    """Any number of mounts may show an image on a read-only file system, as before the first one came."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    first, second = point / "first", point / "second"
    first.touch()
    second.touch()
    with filesystem(Path("none"), source, "-t", "tmpfs"):
        image = new_image(source / "a.qed")
        subprocess.run(["mount", "-o", "remount,ro", str(source)], check=True)
        with mounted(image, first), mounted(image, second):
            assert second.read_bytes() == bytes(MIB)
            with raises_errno(errno.EROFS):
                os.open(second, os.O_RDWR)


# -- without a mount --------------------------------------------------------------------------------------------------

Body = Callable[[MountedImage, "Openings"], Awaitable[None]]


class Openings:
    """Opens real images; to close one takes until `may_close`."""

    def __init__(self) -> None:
        self.closing = trio.Event()
        self.may_close = trio.Event()

    async def open(self, path: str) -> Image:
        image = await open_for_use(path, read_only=True)
        close = image.close

        async def closed() -> None:
            self.closing.set()
            await self.may_close.wait()
            await close()

        image.close = closed  # type: ignore[method-assign]
        return image


def run(path: Path, body: Body, *, linger: float = 60.0) -> None:
    async def main() -> None:
        await create_image(str(path), MIB)
        openings = Openings()
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                mounted = MountedImage(str(path), openings.open, nursery, read_only=False, linger=linger)
                await body(mounted, openings)
                openings.may_close.set()
                await mounted.close()

    trio.run(main)


async def _fail(self: FileStorage) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_one_that_has_failed_makes_no_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        image = await acquire(mounted, to_write=True)
        await image.write(0, b"x" * 4096)
        with monkeypatch.context() as patch:
            patch.setattr(FileStorage, "sync", _fail)
            with raises_errno(errno.EIO):
                await image.flush()
        mounted.release()
        with trio.fail_after(5):
            for _ in range(2):
                await trio.sleep(0.1)
                assert not await mounted.close_if_idle()
                assert await acquire(mounted, to_write=False) is image
                mounted.release()

    run(tmp_path / "a.qed", body, linger=0.01)


async def _no_space(self: FileStorage, offset: int, buffers: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_one_that_could_not_be_written_makes_way_as_soon_as_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        openings.may_close.set()
        image = await acquire(mounted, to_write=True)
        await image.write(0, b"x" * 4096)
        mounted.release()
        with monkeypatch.context() as patch:
            patch.setattr(FileStorage, "write", _no_space)
            for _ in range(3):
                assert not await mounted.close_if_idle()
            assert mounted.unwritten is not None
        with trio.fail_after(1):
            assert await mounted.close_if_idle()

    run(tmp_path / "a.qed", body)


def test_a_close_that_has_begun_is_waited_for(tmp_path: Path) -> None:
    async def body(mounted: MountedImage, openings: Openings) -> None:
        await acquire(mounted, to_write=True)
        mounted.release()
        closed = []

        async def make_way() -> None:
            closed.append(await mounted.close_if_idle())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_way)
            await openings.closing.wait()
            nursery.start_soon(make_way)
            await trio.sleep(0.05)
            assert not closed
            openings.may_close.set()
        assert closed == [True, True]

    run(tmp_path / "a.qed", body)


class Taken:
    """A MountedImage whose file others have, for so many `times`."""

    open = False
    opened = object()

    def __init__(self, times: int) -> None:
        self._times = times

    async def acquire(self, *, to_write: bool) -> ImageSlot:
        self._times -= 1
        if self._times >= 0:
            raise InUseError("other.qed", "taken")
        storage = SimpleNamespace(stat=lambda: os.stat_result((0,) * 19))
        return slot_of(SimpleNamespace(storage=storage))

    async def make_writable(self) -> None:
        pass


def test_the_one_in_the_way_may_be_gone_before_it_is_looked_for() -> None:
    node = Node(99, Taken(1), FileId(0, 0), FileMark(0, 0, 0), 0, fixed=True)  # type: ignore[arg-type]
    trio.run(partial(Tree().acquire, node, to_write=True))


def test_one_that_cannot_be_closed_keeps_no_other_one_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_WAY_PATIENCE", 0.2)

    async def body(mounted: MountedImage, openings: Openings) -> None:
        await mounted.acquire(to_write=False)
        tree = Tree()
        tree.add(mounted)
        mounted.release()

        node = Node(99, Taken(2), FileId(0, 0), tree.nodes[0].mark, 0, fixed=True)  # type: ignore[arg-type]
        with trio.fail_after(5), pytest.raises(InUseError):
            await tree.acquire(node, to_write=True)

    run(tmp_path / "a.qed", body)


def test_an_upgrade_that_took_too_long_leaves_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was given up, and comes to its end all the same."""
    path = tmp_path / "a.qed"
    really_open = FileStorage.open
    ended = []

    def slowly(*args: object, **kwargs: object) -> FileStorage:
        time.sleep(0.5)
        try:
            return really_open(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            ended.append(True)

    async def main() -> None:
        await create_image(str(path), MIB)
        async with open_image(path, read_only=True) as image:
            with monkeypatch.context() as patch:
                patch.setattr(threads, "PATIENCE", 0.1)
                patch.setattr(FileStorage, "open", slowly)
                with pytest.raises(NoAnswerError):
                    await make_writable(image)
                await trio.sleep(1)
            assert ended
            with read_by_qemu(path):
                pass
            await make_writable(image)
            await image.write(0, b"x")

    trio.run(main)


def test_an_upgrade_that_cannot_be_undone_in_all_leaves_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.qed"
    really_close = os.close

    def refuse(_fd: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def close(fd: int) -> None:
        really_close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def main() -> None:
        await create_image(str(path), MIB)
        async with open_image(path, read_only=True) as image:
            with monkeypatch.context() as patch, raises_errno(errno.ENOMEM):
                patch.setattr(upgrade, "share_writers_locks", refuse)
                patch.setattr(os, "close", close)
                await make_writable(image)
            with read_by_qemu(path):
                pass

    trio.run(main)


def test_an_upgrade_of_an_image_that_is_closed_meanwhile_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.qed"

    async def main() -> None:
        await create_image(str(path), MIB)
        async with open_image(path, read_only=True) as image:

            async def close(*args: object) -> NoReturn:
                await image.storage.close()
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            with monkeypatch.context() as patch:
                patch.setattr(upgrade, "read_header", close)
                with pytest.raises(OSError, match="Input/output error"):
                    await make_writable(image)

    trio.run(main)
    assert not [fd for fd in Path("/proc/self/fd").iterdir() if os.path.realpath(fd) == str(path)]


def test_why_it_cannot_be_upgraded_is_said_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.qed"

    def refuse(*args: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), args[0])

    async def main() -> None:
        await create_image(str(path), MIB)
        async with open_image(path, read_only=True) as image:
            with monkeypatch.context() as patch:
                patch.setattr(os, "open", refuse)
                with pytest.raises(OSError, match="Too many open files") as caught:
                    await make_writable(image)
            assert caught.value.filename == str(path)
            with read_by_qemu(path):
                pass

    trio.run(main)
