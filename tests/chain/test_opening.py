"""`open_image`: what it leaves behind, whatever happens in the block."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

import qedfuse
from qedfuse.chain.opening import open_for_use, open_image
from qedfuse.errors import InUseError, QedfuseError, UsageError
from qedfuse.host.file_storage import FileStorage
from qedfuse.qed.commit import Committer
from qedfuse.qed.image import Image
from tests.helpers.images.chains import (
    SIZE,
    check_is_clean,
    header_of,
    make_qed,
    make_raw,
    pattern,
    qemu_bytes,
    qemu_writes,
    run,
)
from tests.helpers.qemu.cli import tool


async def until_committed(image: Path, content: bytes) -> None:
    """Until the file itself says what was written."""
    while True:
        async with open_image(image, read_only=True, share=True) as other:
            if await other.read(0, len(content)) == content:
                return
        await trio.sleep(0.1)


# -- the ordinary life of an image ------------------------------------------------------------------------------------


def test_write_close_and_let_qemu_read(image: Path) -> None:
    async def write() -> None:
        async with qedfuse.open_image(image) as disk:
            assert disk.writable
            assert disk.size == SIZE
            await disk.write(1000, b"x" * 100_000)
            assert not qemu_writes(image)

    run(write)
    assert not header_of(image).needs_check
    check_is_clean(image)
    assert qemu_bytes(image) == bytes(1000) + b"x" * 100_000 + bytes(SIZE - 101_000)
    assert qemu_writes(image)


def test_copy_on_write_leaves_the_backing_file_alone(tmp_path: Path) -> None:
    base = make_raw(tmp_path / "base.raw")
    image = make_qed(tmp_path / "top.qed", "base.raw", raw=True)

    async def write() -> None:
        async with open_image(image) as disk:
            await disk.write(SIZE // 2, b"new")
            assert not qemu_writes(image)
            assert not qemu_writes(base, "raw")

    run(write)
    expected = bytearray(pattern(0xA5))
    expected[SIZE // 2 : SIZE // 2 + 3] = b"new"
    assert base.read_bytes() == pattern(0xA5)
    assert qemu_bytes(image) == expected
    check_is_clean(image)


def test_read_only_does_not_touch_the_file(image: Path) -> None:
    tool("qemu-io", "-f", "qed", "-c", "write -P 0x55 0 64k", image)
    before = image.read_bytes(), image.stat().st_mtime_ns

    async def read() -> None:
        async with open_image(image, read_only=True) as disk:
            assert not disk.writable
            assert bytes(await disk.read(0, SIZE)) == bytes([0x55]) * (64 << 10) + bytes(SIZE - (64 << 10))
            with pytest.raises(OSError, match="read-only"):
                await disk.write(0, b"x")

    run(read)
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


def test_two_readers_or_one_writer(image: Path) -> None:
    async def opened_twice(first_read_only: bool, second_read_only: bool) -> None:
        async with open_image(image, read_only=first_read_only), open_image(image, read_only=second_read_only):
            pass

    run(lambda: opened_twice(True, True))
    for first, second in ((False, False), (False, True), (True, False)):
        with pytest.raises(InUseError, match=f"{image}: is in use by this process"):
            run(partial(opened_twice, first, second))


def test_a_look_at_an_image_in_use(image: Path) -> None:
    async def look() -> None:
        async with open_image(image):
            async with open_image(image, read_only=True, share=True) as other:
                assert await other.read(0, SIZE) == bytes(SIZE)
            with pytest.raises(UsageError, match="-U"):
                async with open_image(image, share=True):
                    pass

    run(look)


def test_the_timer_commits_by_itself(tmp_path: Path) -> None:
    """Without a flush and while the image is open: the file says what was written."""
    make_raw(tmp_path / "base.raw")
    image = make_qed(tmp_path / "top.qed", "base.raw", raw=True)

    async def write_and_wait() -> None:
        async with open_image(image) as disk:
            await disk.write(0, b"new")
            with trio.fail_after(30):
                await until_committed(image, b"new")

    run(write_and_wait)


# -- ends -------------------------------------------------------------------------------------------------------------


def test_an_error_in_the_block_comes_out_as_it_is(image: Path) -> None:
    async def fail() -> None:
        async with open_image(image) as disk:
            await disk.write(0, b"written")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(fail)
    check_is_clean(image)
    assert not header_of(image).needs_check
    assert qemu_bytes(image)[:7] == b"written"


@pytest.mark.parametrize("backing", [False, True])
def test_cancelled(image: Path, tmp_path: Path, backing: bool) -> None:
    if backing:
        make_raw(tmp_path / "base.raw")
        make_qed(image, "base.raw", raw=True)

    async def cancelled() -> bool:
        with trio.CancelScope() as scope:
            async with open_image(image) as disk:
                await disk.write(0, b"written")
                scope.cancel()
                await trio.sleep_forever()
        return scope.cancelled_caught

    assert run(cancelled)
    check_is_clean(image)
    assert not header_of(image).needs_check
    assert qemu_bytes(image)[:7] == b"written"


def test_a_failing_close(image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real_close = Image.close

    async def close(self: Image) -> None:
        await real_close(self)
        raise QedfuseError(self.path, "the disk is gone", errno.EIO)

    monkeypatch.setattr(Image, "close", close)

    async def opened(error: Exception | None) -> None:
        async with open_image(image):
            if error:
                raise error

    with pytest.raises(QedfuseError, match="the disk is gone"):
        run(lambda: opened(None))
    assert caplog.messages == []
    with pytest.raises(KeyError):
        run(lambda: opened(KeyError()))
    assert caplog.messages == [f"{image}: closing failed: {image}: the disk is gone"]


def test_the_timer_outlives_the_close(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block is cancelled, but a commit that the timer has begun is not: closing needs its outcome."""
    events: list[str] = []
    real_close, real_background = Committer.close, Image.run_background

    async def close(self: Committer) -> None:
        await real_close(self)
        await trio.testing.wait_all_tasks_blocked()
        events.append("committed")

    async def run_background(self: Image) -> None:
        try:
            await real_background(self)
        finally:
            events.append("timer ended")

    monkeypatch.setattr(Committer, "close", close)
    monkeypatch.setattr(Image, "run_background", run_background)

    async def cancelled() -> None:
        with trio.CancelScope() as scope:
            async with open_image(image):
                scope.cancel()
                await trio.sleep_forever()

    run(cancelled)
    assert events == ["committed", "timer ended"]


def test_an_image_outlives_the_nursery_in_which_it_was_opened(image: Path) -> None:
    """Its timer, too; any task may close it."""

    async def open_and_close() -> None:
        async with trio.open_nursery() as nursery:
            disk = await nursery.start(open_it)
            nursery.cancel_scope.cancel()
        await disk.write(0, b"written")
        with trio.fail_after(30):
            await until_committed(image, b"written")
        await disk.close()
        await disk.close()

    async def open_it(task_status: trio.TaskStatus[Image]) -> None:
        task_status.started(await open_for_use(image))
        await trio.sleep_forever()

    run(open_and_close)
    check_is_clean(image)
    assert not header_of(image).needs_check
    assert qemu_bytes(image)[:7] == b"written"


def test_without_its_timer_it_goes_on(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run_background(self: Image) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(Image, "run_background", run_background)

    async def write() -> None:
        async with open_image(image) as disk:
            await trio.testing.wait_all_tasks_blocked()
            await disk.write(0, b"written")

    run(write)
    assert caplog.messages == [f"{image}: the timer has ended, only a flush commits now"]
    check_is_clean(image)
    assert qemu_bytes(image)[:7] == b"written"


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_cancelled_while_opening(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever image of a chain: nothing stays open."""
    make_raw(tmp_path / "0.raw")
    make_qed(tmp_path / "1.qed", "0.raw")
    make_qed(tmp_path / "2.qed", "1.qed")
    top = make_qed(tmp_path / "3.qed", "2.qed")
    scope = trio.CancelScope()
    real_init = FileStorage.__init__
    opened: list[str] = []

    def note_open(self: FileStorage, path: str, fd: int, writable: bool) -> None:
        real_init(self, path, fd, writable)
        opened.append(path)
        if len(opened) == step:
            trio.from_thread.run_sync(scope.cancel)

    monkeypatch.setattr(FileStorage, "__init__", note_open)

    async def open_chain() -> None:
        with scope:
            async with open_image(top):
                await trio.lowlevel.checkpoint()

    run(open_chain)
    assert scope.cancelled_caught
    assert len(opened) == step
    assert qemu_writes(top)
