"""The real file on a host that transfers too little, interrupts, or fails: calls are finished, or their errno told."""

from __future__ import annotations

import ctypes
import errno
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from qedfuse.host import file_storage as module
from qedfuse.host.file_storage import FileStorage
from tests.helpers.judges.expect import raises_errno


class Meager:
    """System calls that transfer less than they are asked to, by turns 1 byte, half, 4095 bytes and all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        preadv, pwrite, pwritev = os.preadv, os.pwrite, os.pwritev

        def fewer(size: int) -> int:
            self.calls += 1
            return max(1, min(size, [1, size // 2, 4095, size][self.calls % 4])) if size else 0

        def meager_preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            return preadv(fd, [buffers[0][: fewer(len(buffers[0]))]], offset, flags)

        def meager_pwrite(fd: int, data: bytes, offset: int) -> int:
            return pwrite(fd, memoryview(data)[: fewer(len(data))], offset)

        def meager_pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
            if self.calls % 3 == 0 and len(buffers) > 1:  # some buffers whole, and a part of the next
                self.calls += 1
                return pwritev(fd, [buffers[0], buffers[1][: len(buffers[1]) // 2]], offset)
            return pwritev(fd, [memoryview(buffers[0])[: fewer(len(buffers[0]))]], offset)

        monkeypatch.setattr(os, "preadv", meager_preadv)
        monkeypatch.setattr(os, "pwrite", meager_pwrite)
        monkeypatch.setattr(os, "pwritev", meager_pwritev)


@pytest.mark.parametrize("size", [1, 4096, 10_000, (1 << 20) + 77])
def test_short_transfers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    meager = Meager(monkeypatch)

    async def main() -> None:
        rnd = random.Random(size)
        storage = FileStorage.open(path, writable=True)
        try:
            for _ in range(8):
                data = rnd.randbytes(size)
                buffers: list[bytes | bytearray | memoryview] = []
                position = 0
                while position < size:
                    length = rnd.randint(0, max(1, size // 3))
                    buffers.append(data[position : position + length])
                    position += length
                await storage.write(11, buffers)
                assert path.read_bytes()[11:] == data
                data = rnd.randbytes(size)
                if not storage.write_nowait(11, data):
                    await storage.write(11, [data])
                assert path.read_bytes()[11:] == data
                target = bytearray(size)
                if not storage.read_into_nowait(11, memoryview(target)):
                    await storage.read_into(11, memoryview(target))
                assert target == data
        finally:
            await storage.close()

    trio.run(main)
    assert meager.calls > 20


@pytest.mark.parametrize("name", ["preadv", "pwrite", "pwritev", "fdatasync", "ftruncate"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_errors_of_the_real_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """The errno and the file's name get through, from the spot and from a thread."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))

    def fail(*_arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, fail)

    async def main() -> None:
        storage = FileStorage.open(path, writable=True)
        large = bytes(2 << 20)
        uses: dict[str, list[Callable[[], Awaitable[object]]]] = {
            "preadv": [lambda: storage.read_into(0, memoryview(bytearray(10)))],
            "pwrite": [lambda: storage.write(0, [b"x"]), lambda: storage.write(0, [large])],
            "pwritev": [lambda: storage.write(0, [b"x", b"y"]), lambda: storage.write(0, [large, large])],
            "fdatasync": [storage.sync],
            "ftruncate": [lambda: storage.truncate(5)],
        }
        for use in uses[name]:
            with pytest.raises(OSError, match=str(path)) as caught:
                await use()
            assert caught.value.errno == code
        if name == "preadv":
            with raises_errno(code):
                storage.read_into_nowait(0, memoryview(bytearray(10)))
        if name == "pwrite":
            with raises_errno(code):
                storage.write_nowait(0, b"x")
        await storage.close()

    trio.run(main)


def test_a_file_that_cannot_be_looked_at_is_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    looks: list[int] = []
    fstat = os.fstat

    def fail_the_last(fd: int) -> os.stat_result:
        looks.append(fd)
        if len(looks) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return fstat(fd)

    with monkeypatch.context() as patch, raises_errno(errno.EIO):
        patch.setattr(os, "fstat", fail_the_last)
        FileStorage.open(path, writable=True)
    with raises_errno(errno.EBADF):
        os.fstat(looks[0])


def test_a_second_opening_whose_close_fails_has_been_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the first one's by then, and a failure would say that it is not."""
    path = tmp_path / "file"
    path.touch()
    file = FileStorage.open(path, writable=False)
    close = os.close

    def fail(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", fail)
        file.become(FileStorage.open(path, writable=True))
    assert file.writable
    assert file.write_nowait(0, b"x")
    trio.run(file.close)
    assert path.read_bytes() == b"x"


def test_a_write_of_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that writes 0 bytes again and again must not hang us."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)

    async def main() -> None:
        storage = FileStorage.open(path, writable=True)
        for buffers in ([b"xy"], [b"x", b"y"]):
            with raises_errno(errno.EIO):
                await storage.write(0, buffers)
        await storage.close()

    trio.run(main)


def test_interrupted_punch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fallocate is called by hand: EINTR is ours to retry, and EOPNOTSUPP means writing zeroes."""
    path = tmp_path / "file"
    codes = [errno.EINTR, errno.EINTR, errno.EOPNOTSUPP]

    class Libc:
        def fallocate64(self, *_arguments: int) -> int:
            ctypes.set_errno(codes.pop(0))
            return -1

    monkeypatch.setattr(module, "_libc", Libc)

    async def main() -> None:
        path.write_bytes(b"x" * 10_000)
        storage = FileStorage.open(path, writable=True)
        await storage.punch(100, 8000)
        assert path.read_bytes() == b"x" * 100 + bytes(8000) + b"x" * 1900 and not codes
        codes.append(errno.EIO)
        with raises_errno(errno.EIO):
            await storage.punch(0, 1)
        await storage.close()

    trio.run(main)
