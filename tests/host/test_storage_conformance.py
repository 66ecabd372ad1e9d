"""What every `storage.Storage` promises, asked of the real file and of the one in memory."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qedfuse.host.file_storage import INLINE_WRITE_LIMIT, FileStorage
from qedfuse.host.storage import Storage
from tests.helpers.doubles.ram import PAGE, Chaos, RamFile, RamStorage
from tests.helpers.judges.expect import raises_errno

Use = Callable[[Storage], Awaitable[None]]
KINDS = ["file", "ram", "ram chaotic", "ram without punch"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def opened(kind: str, tmp_path: Path, content: bytes, writable: bool = True) -> AsyncIterator[Storage]:
    storage: Storage
    if kind == "file":
        path = tmp_path / "file"
        path.write_bytes(content)
        storage = FileStorage.open(path, writable)
    else:
        file = RamFile()
        file.write(0, content)
        chaos = Chaos(1) if kind == "ram chaotic" else None
        storage = RamStorage("ram", file, writable=writable, chaos=chaos, punches=kind != "ram without punch")
    try:
        yield storage
    finally:
        await storage.close()


async def read(storage: Storage, offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    if not storage.read_into_nowait(offset, memoryview(buffer)):
        await storage.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_writes_are_read_back(kind: str, tmp_path: Path) -> None:
    """Any offset and size, one buffer and many, against a byte array."""

    async def main() -> None:
        rnd = random.Random(3)
        model = bytearray(300_000)
        async with opened(kind, tmp_path, bytes(model)) as storage:
            for _ in range(300):
                size = rnd.choice([0, 1, 511, 512, PAGE, 3 * PAGE + 17, 40_000])
                offset = rnd.randrange(len(model) - size)
                choice = rnd.random()
                if choice < 0.3:
                    data = rnd.randbytes(size)
                    if not storage.write_nowait(offset, data):
                        await storage.write(offset, [data])
                    model[offset : offset + size] = data
                elif choice < 0.6:
                    buffers = [rnd.randbytes(rnd.randrange(size // 3 + 1)) for _ in range(3)]
                    await storage.write(offset, [buffers[0], bytearray(buffers[1]), memoryview(buffers[2])])
                    data = b"".join(buffers)
                    model[offset : offset + len(data)] = data
                elif choice < 0.7 and size:
                    await storage.punch(offset, size)
                    model[offset : offset + size] = bytes(size)
                else:
                    assert await read(storage, offset, size) == model[offset : offset + size]
            await storage.sync()
            assert storage.stat().st_size == len(model)
            assert await read(storage, 0, len(model)) == model

    trio.run(main)


def test_large_and_many_buffers(kind: str, tmp_path: Path) -> None:
    """More than what is written on the spot, and more buffers than one pwritev takes."""

    async def main() -> None:
        async with opened(kind, tmp_path, b"") as storage:
            large = random.Random(1).randbytes(INLINE_WRITE_LIMIT + 5)
            if storage.write_nowait(3, large):
                assert kind != "file"
            else:
                await storage.write(3, [large])
            assert await read(storage, 0, len(large) + 3) == bytes(3) + large
            pieces = [bytes([number % 251 + 1]) * (number % 3) for number in range(3000)]
            await storage.write(7, pieces)
            assert await read(storage, 7, len(b"".join(pieces))) == b"".join(pieces)

    trio.run(main)


def test_end_of_file(kind: str, tmp_path: Path) -> None:
    """A read past the last sector is EIO, never short; a write past it grows the file, with zeroes between."""

    async def main() -> None:
        async with opened(kind, tmp_path, b"x" * 1000) as storage:
            for offset, size in ((0, 1001), (1000, 1), (700, 324), (1023, 1)):
                assert not storage.read_into_nowait(offset, memoryview(bytearray(size)))
                target = bytearray(b"x" * size)
                await storage.read_into(offset, memoryview(target))
                assert target == b"x" * (1000 - offset) + bytes(size + min(offset, 1000) - 1000)
            for offset, size in ((0, 1025), (1000, 25), (1024, 1), (5000, 10)):
                assert not storage.read_into_nowait(offset, memoryview(bytearray(size)))
                with raises_errno(errno.EIO):
                    await storage.read_into(offset, memoryview(bytearray(size)))
            await storage.write(9000, [b"y"])
            assert storage.stat().st_size == 9001
            assert await read(storage, 990, 8011) == b"x" * 10 + bytes(8000) + b"y"

    trio.run(main)


def test_truncate(kind: str, tmp_path: Path) -> None:
    """What was cut off does not come back."""

    async def main() -> None:
        async with opened(kind, tmp_path, b"x" * 20_000) as storage:
            await storage.truncate(5000)
            assert storage.stat().st_size == 5000
            await storage.truncate(30_000)
            assert storage.stat().st_size == 30_000
            assert await read(storage, 0, 30_000) == b"x" * 5000 + bytes(25_000)

    trio.run(main)


def test_holes(kind: str, tmp_path: Path) -> None:
    """Where data is, by next_data, next_hole and st_blocks."""

    async def main() -> None:
        async with opened(kind, tmp_path, b"") as storage:
            await storage.truncate(64 * PAGE)
            assert storage.next_data(0) is None and storage.next_hole(5) == 5 and storage.stat().st_blocks == 0
            await storage.write(16 * PAGE, [b"z" * 4 * PAGE])
            await storage.sync()
            assert storage.next_data(0) == 16 * PAGE and storage.next_data(17 * PAGE + 3) == 17 * PAGE + 3
            assert storage.next_hole(0) == 0 and storage.next_hole(16 * PAGE) == 20 * PAGE
            assert storage.next_data(20 * PAGE) is None and storage.next_data(1 << 40) is None
            assert storage.stat().st_blocks * 512 >= 4 * PAGE
            with raises_errno(errno.ENXIO):
                storage.next_hole(64 * PAGE)
            hole, data, rest = await storage.find_extents([(5, 10), (3 * PAGE, 64 * PAGE), (20 * PAGE, 21 * PAGE)], 2)
            assert (hole.start, hole.end, hole.is_data) == (5, 16 * PAGE, False)
            assert (data.start, data.end, data.is_data) == (16 * PAGE, 20 * PAGE, True)
            assert rest.start == 20 * PAGE and rest.end >= 64 * PAGE and not rest.is_data
            await storage.write(63 * PAGE, [b"z" * PAGE])
            assert storage.next_hole(63 * PAGE) == 64 * PAGE
            await storage.punch(16 * PAGE, 4 * PAGE)
            assert await read(storage, 15 * PAGE, 6 * PAGE) == bytes(6 * PAGE)
            if kind != "ram without punch":
                assert storage.next_data(0) == 63 * PAGE

    trio.run(main)


def test_errors(kind: str, tmp_path: Path) -> None:
    """Not open for writing, closed: EBADF. Closing twice is nothing."""

    async def main() -> None:
        async with opened(kind, tmp_path, b"abc", writable=False) as storage:
            for size in (1, INLINE_WRITE_LIMIT + 1):
                with raises_errno(errno.EBADF):
                    await storage.write(0, [bytes(size)])
            assert await read(storage, 0, 3) == b"abc"
            await storage.close()
            await storage.close()
            with raises_errno(errno.EBADF):
                await storage.read_into(0, memoryview(bytearray(1)))

    trio.run(main)


def test_a_closed_file_stays_closed(tmp_path: Path) -> None:
    """Its descriptor's number may belong to another file by then, which must not be touched."""
    (tmp_path / "ours").write_bytes(b"ours")
    (tmp_path / "theirs").write_bytes(b"theirs")

    async def main() -> None:
        storage = FileStorage.open(tmp_path / "ours", writable=True)
        number = storage.fileno()
        await storage.close()
        other = FileStorage.open(tmp_path / "theirs", writable=True)
        try:
            assert other.fileno() == number, "the test needs the number to be used again"
            with raises_errno(errno.EBADF):
                storage.write_nowait(0, b"XXXX")
            with raises_errno(errno.EBADF):
                storage.read_into_nowait(0, memoryview(bytearray(4)))
            with raises_errno(errno.EBADF):
                await storage.truncate(0)
            await storage.close()
            assert await read(other, 0, 6) == b"theirs"
        finally:
            await other.close()

    trio.run(main)
