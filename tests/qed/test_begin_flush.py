"""A flush that is driven from one system call to the next, without an event loop, as the fast path does it."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfuse.chain.opening import open_image
from qedfuse.host.stepping import Stepper
from qedfuse.qed.image import Image
from qedfuse.sizes import HostOffset
from tests.helpers.doubles.request import NotedRequest, no_opener
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.injection import injected
from tests.helpers.mounts.modes import NEEDS_NATIVE
from tests.helpers.mounts.mounts import counters, mounted
from tests.helpers.mounts.slots import slot_of
from tests.helpers.qemu.cli import qemu_img

KIB = 1 << 10
FRESH = 512 * KIB


def make(tmp_path: Path, *, backing: bool = False) -> Path:
    path = tmp_path / "disk.qed"
    options: list[str] = []
    if backing:
        (tmp_path / "base.raw").write_bytes(b"b" * 1024 * KIB)
        options = ["-b", str(tmp_path / "base.raw"), "-F", "raw"]
    qemu_img("create", "-q", "-f", "qed", *options, path, "1M")
    return path


async def prepare(image: Image) -> None:
    """There is a table and a mark, and something to commit: from here on a flush is writes of pages and syncs."""
    await image.write(0, b"first")
    await image.flush()
    await image.write(FRESH, b"second")
    committer = image.committer
    assert committer is not None
    while committer._committing:  # noqa: ASYNC110  # the mark
        await trio.sleep(0.01)


def begin(image: Image) -> Stepper:
    flush = image.begin_flush()
    assert flush is not None
    return Stepper(flush)


def drive(stepper: Stepper) -> list[str]:
    """Make every call on the spot. Returns what they were."""
    made = []
    while stepper.call is not None:
        made.append(stepper.call.function.__name__)
        stepper.advance(stepper.call())
    return made


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_what_it_syncs_is_in_the_file(tmp_path: Path, backing: bool) -> None:
    path, copy = make(tmp_path, backing=backing), tmp_path / "copy.qed"

    async def main() -> None:
        async with open_image(path) as image:
            await prepare(image)
            # With a backing file the data is durable before the entry that points at it.
            assert drive(begin(image)) == ["fdatasync"] * (2 if backing else 1)
            shutil.copyfile(path, copy)
            assert drive(begin(image)) == []
        async with open_image(copy, read_only=True) as image:
            assert await image.read(FRESH, 6) == b"second"

    trio.run(main)


def test_a_read_only_image_syncs_what_others_have_written(tmp_path: Path) -> None:
    path = make(tmp_path)

    async def main() -> None:
        async with open_image(path, read_only=True) as image:
            assert drive(begin(image)) == ["fdatasync"]

    trio.run(main)


def test_a_failed_sync_is_final(tmp_path: Path) -> None:
    path = make(tmp_path)

    async def main() -> None:
        async with open_image(path) as image:
            await prepare(image)
            stepper = begin(image)
            with raises_errno(errno.ENOSPC):
                stepper.advance(None, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            assert stepper.call is None
            with raises_errno(errno.EIO):
                image.begin_flush()
            with raises_errno(errno.EIO):  # the lock is free
                await image.flush()

    with raises_errno(errno.EIO):
        trio.run(main)


@pytest.mark.parametrize("stepped", [False, True])
def test_a_sync_that_was_not_made_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stepped: bool
) -> None:
    """No memory for it, say. Nothing is in the tables' pages that would have the next flush do anything."""
    path = make(tmp_path)

    async def not_now() -> None:
        raise MemoryError

    async def main() -> None:
        async with open_image(path) as image:
            await prepare(image)
            await image.flush()
            await image.write(FRESH, b"again")
            await trio.testing.wait_all_tasks_blocked()
            with monkeypatch.context() as patch:
                patch.setattr(image.storage, "sync", not_now)
                flush = image.begin_flush() if stepped else image.flush()
                assert flush is not None
                with pytest.raises(MemoryError):
                    await flush
            assert drive(begin(image)) == ["fdatasync"]

    trio.run(main)


def test_flushes_that_come_meanwhile_wait_and_do_their_own(tmp_path: Path) -> None:
    path = make(tmp_path)
    copy = tmp_path / "copy.qed"
    ended: list[str] = []

    async def flush(image: Image) -> None:
        await image.flush()
        ended.append("flush")

    async def main() -> None:
        async with open_image(path) as image:
            await prepare(image)
            stepper = begin(image)
            await image.write(FRESH + 128 * KIB, b"third")  # not in this commit
            assert image.begin_flush() is None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flush, image)
                nursery.start_soon(flush, image)
                await trio.testing.wait_all_tasks_blocked()
                assert ended == []
                drive(stepper)
            assert ended == ["flush", "flush"]
            shutil.copyfile(path, copy)
        async with open_image(copy, read_only=True) as image:
            assert await image.read(FRESH + 128 * KIB, 5) == b"third"

    trio.run(main)


def test_not_while_the_file_has_to_grow(tmp_path: Path) -> None:
    """That waits for other writers, who may be growing it."""
    path = make(tmp_path)

    async def main() -> None:
        async with open_image(path) as image:
            await prepare(image)
            committer = image.committer
            assert committer is not None
            committer.growth.file_size -= 128 << 20
            assert image.begin_flush() is None
            committer.growth.file_size += 128 << 20
            drive(begin(image))

    trio.run(main)


def test_what_needs_an_event_loop_is_refused() -> None:
    ended = []

    async def sleepy() -> None:
        try:
            await trio.sleep(1)
        finally:
            ended.append(1)

    async def main() -> None:
        with pytest.raises(RuntimeError, match="needs an event loop"):
            Stepper(sleepy())
        assert ended

    trio.run(main)


# -- on a mount -------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_a_slow_sync_holds_nobody_up(tmp_path: Path, raw: Path, backing: bool) -> None:
    """Readers are served while it lasts (the kernel itself has writers wait)."""
    image = make(tmp_path, backing=backing)
    with mounted(image, raw, "-o", "direct_io") as mount:
        fd = os.open(raw, os.O_RDWR)
        try:
            os.pwrite(fd, b"x" * 4096, 0)
            os.fsync(fd)
            with injected(mount.pid(), "fdatasync:delay_enter=400000"):
                os.pwrite(fd, b"y" * 4096, FRESH)
                threads = [threading.Thread(target=os.fsync, args=(fd,)) for _ in range(4)]
                started = time.monotonic()
                for thread in threads:
                    thread.start()
                time.sleep(0.1)
                slowest = 0.0
                while any(thread.is_alive() for thread in threads):
                    slowest = max(slowest, timed(lambda: os.pread(fd, 4096, 0)))
                    time.sleep(0.01)
                for thread in threads:
                    thread.join()
                assert time.monotonic() - started > 0.35 * (2 if backing else 1)
            assert slowest < 0.3, f"somebody waited for {slowest:.3f} s"
            assert os.pread(fd, 1, FRESH) == b"y"
        finally:
            os.close(fd)
    qemu_img("check", "-q", image)


class TestNative:
    pytestmark = NEEDS_NATIVE

    def test_a_long_commit_of_short_calls_holds_nobody_up(self, tmp_path: Path) -> None:
        from qedfuse.fuse.bypass import HandOver

        path = make(tmp_path)
        turns: list[float] = []

        async def take_turns() -> None:
            while True:
                turns.append(time.monotonic())
                await trio.sleep(0.001)

        async def main() -> None:
            async with open_image(path) as image, trio.open_nursery() as nursery:
                await image.write(0, b"x" * 1024 * KIB)
                await image.flush()
                for offset in range(0, 1024 * KIB, 512):  # as if they had been lost: there is nothing behind the end
                    image.clusters.lose(HostOffset((1 << 40) + 2 * offset), 512)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(take_turns)
                await trio.sleep(0.01)
                hand_over = HandOver(nursery, {1: slot_of(image)}, None, (lambda: None, lambda: None), no_opener)
                request = NotedRequest()
                assert not hand_over.fsync(request, 1)
                assert await request.replied() == 0
                nursery.cancel_scope.cancel()

        trio.run(main)
        longest = max(later - turn for turn, later in pairwise(turns))
        assert len(turns) > 10
        assert longest < 0.05, f"nobody else had a turn for {longest:.3f} s"

    def test_fsyncs_are_answered_past_pyfuse3(self, tmp_path: Path, raw: Path) -> None:
        with mounted(make(tmp_path), raw), raw.open("r+b", buffering=0) as file:
            for _ in range(20):
                file.write(b"x" * 4096)
                os.fsync(file.fileno())
            assert counters(raw)["syncs"] == 20

    def test_syncs_of_several_images_run_side_by_side(self, tmp_path: Path) -> None:
        point = tmp_path / "mnt"
        point.mkdir()
        images = []
        for number in range(4):
            (tmp_path / str(number)).mkdir()
            images.append(make(tmp_path / str(number)).rename(tmp_path / f"{number}.qed"))
        with mounted(*images, point) as mount:
            files = [os.open(point / f"{image.stem}.raw", os.O_RDWR) for image in images]
            for fd in files:
                os.pwrite(fd, b"x" * 4096, 0)
                os.fsync(fd)
                os.pwrite(fd, b"y" * 4096, 0)
            threads = [threading.Thread(target=os.fsync, args=(fd,)) for fd in files]
            with injected(mount.pid(), "fdatasync:delay_enter=500000"):
                started = time.monotonic()
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert 0.45 < time.monotonic() - started < 1.4
            for fd in files:
                os.close(fd)

    @pytest.mark.parametrize("delay", ["", ":delay_enter=20000"], ids=["at once", "late"])
    def test_the_error_arrives(self, tmp_path: Path, raw: Path, delay: str) -> None:
        with mounted(make(tmp_path), raw) as mount:
            fd = os.open(raw, os.O_RDWR)
            os.pwrite(fd, b"x" * 4096, 0)
            os.fsync(fd)
            os.pwrite(fd, b"y" * 4096, 0)
            with injected(mount.pid(), f"fdatasync:error=EIO{delay}"), raises_errno(errno.EIO):
                os.fsync(fd)
            with raises_errno(errno.EIO):
                os.fsync(fd)
            with raises_errno(errno.EIO):
                os.close(fd)
            assert "fsync failed" in mount.text()
            assert mount.umount().code == 1
