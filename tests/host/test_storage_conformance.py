"""What every `Storage` promises: real files, a real block device, and those in RAM that stand in for them elsewhere."""

from __future__ import annotations

import errno
import random
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from qedfuse.host.file_storage import INLINE_WRITE_LIMIT, FileStorage
from qedfuse.host.mountinfo import mount_id
from qedfuse.host.remote_file import RemoteFile
from qedfuse.host.storage import Storage, held_bytes, read
from tests.helpers.doubles.crash import CrashStorage
from tests.helpers.doubles.faults import FaultStorage
from tests.helpers.doubles.ram import PAGE, Chaos, RamFile, RamStorage
from tests.helpers.images.devices import device_with
from tests.helpers.judges.expect import raises_errno
from tests.helpers.judges.history import Clock

#: Files, which grow; of a remote one nothing is known of its holes.
FILES = ["file", "remote file", "ram", "ram, chaotic", "ram, without punch", "ram, with a log", "ram, to fail"]
#: Block devices, which do not.
DEVICES = ["loop device", "ram, a device", "ram, a chaotic device"]
#: Where holes are told.
TELLS = [kind for kind in FILES if kind != "remote file"]
#: Where no page cache or delayed allocation stands between what is written and what is held.
EXACT = [kind for kind in TELLS if kind != "file"]

Opening = Callable[..., AbstractAsyncContextManager[Storage]]


@pytest.fixture
def opened(kind: str, tmp_path: Path) -> Iterator[Opening]:
    """Opens a storage of that kind with a content, of whole pages if it is to be a device's."""
    with ExitStack() as stack:

        @asynccontextmanager
        async def opening(content: bytes, writable: bool = True) -> AsyncIterator[Storage]:
            storage = _make(kind, content, writable, tmp_path, stack)
            try:
                yield storage
            finally:
                await storage.close()

        yield opening


def _make(kind: str, content: bytes, writable: bool, directory: Path, stack: ExitStack) -> Storage:
    path = directory / "file"
    path.write_bytes(content)
    if kind == "file":
        return FileStorage.open(path, writable)
    if kind == "remote file":
        file = FileStorage.open(path, writable)
        return RemoteFile(file.path, file.fileno(), writable, mount_id(file.fileno()))
    if kind == "loop device":
        return FileStorage.open(stack.enter_context(device_with(path, len(content))), writable)
    ram = RamFile(fixed=kind in DEVICES)
    ram.write(0, content)
    chaos = Chaos(1) if "chaotic" in kind else None
    if kind == "ram, with a log":
        return CrashStorage("ram", ram, Clock(), writable=writable)
    if kind == "ram, to fail":
        return FaultStorage("ram", ram, Clock(), None, writable=writable)
    return RamStorage("ram", ram, writable=writable, chaos=chaos, punches=kind != "ram, without punch")


@pytest.mark.parametrize("kind", FILES + DEVICES)
def test_writes_are_read_back(opened: Opening) -> None:
    """Any offset and size, one buffer and many, against a byte array."""

    async def main() -> None:
        rnd = random.Random(3)
        model = bytearray(73 * PAGE)
        async with opened(bytes(model)) as storage:
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
            assert storage.size() == len(model)
            assert await read(storage, 0, len(model)) == model

    trio.run(main)


@pytest.mark.parametrize("kind", FILES + DEVICES)
def test_large_and_many_buffers(opened: Opening) -> None:
    """More than what is written on the spot, and more buffers than one pwritev takes."""

    async def main() -> None:
        async with opened(bytes(2 * INLINE_WRITE_LIMIT)) as storage:
            large = random.Random(1).randbytes(INLINE_WRITE_LIMIT + 5)
            if not storage.write_nowait(3, large):
                await storage.write(3, [large])
            assert await read(storage, 0, len(large) + 3) == bytes(3) + large
            pieces = [bytes([number % 251 + 1]) * (number % 3) for number in range(3000)]
            await storage.write(7, pieces)
            assert await read(storage, 7, len(b"".join(pieces))) == b"".join(pieces)
            storage.write_behind(0, len(large))

    trio.run(main)


@pytest.mark.parametrize("kind", FILES)
def test_end_of_file(opened: Opening) -> None:
    """A read past the last sector is EIO, never short; a write past it grows the file, with zeroes between."""

    async def main() -> None:
        async with opened(b"x" * 1000) as storage:
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
            assert storage.stat().st_size == storage.size() == 9001
            assert await read(storage, 990, 8011) == b"x" * 10 + bytes(8000) + b"y"

    trio.run(main)


@pytest.mark.parametrize("kind", FILES)
def test_truncate(opened: Opening) -> None:
    """What was cut off does not come back."""

    async def main() -> None:
        async with opened(b"x" * 20_000) as storage:
            await storage.truncate(5000)
            assert storage.stat().st_size == 5000
            await storage.truncate(30_000)
            assert storage.stat().st_size == storage.size() == 30_000
            assert await read(storage, 0, 30_000) == b"x" * 5000 + bytes(25_000)
            with raises_errno(errno.EFBIG):
                await storage.truncate(1 << 63)

    trio.run(main)


@pytest.mark.parametrize("kind", TELLS)
def test_holes(kind: str, opened: Opening) -> None:
    """Where data is, by next_data, next_hole and find_extents."""

    async def main() -> None:
        async with opened(b"") as storage:
            await storage.truncate(64 * PAGE)
            assert storage.next_data(0) is None and storage.next_hole(5) == 5 and held_bytes(storage) == 0
            await storage.write(16 * PAGE, [b"z" * 4 * PAGE])
            await storage.sync()
            assert storage.next_data(0) == 16 * PAGE and storage.next_data(17 * PAGE + 3) == 17 * PAGE + 3
            assert storage.next_hole(0) == 0 and storage.next_hole(16 * PAGE) == 20 * PAGE
            assert storage.next_hole(17 * PAGE + 3) == 20 * PAGE and storage.next_hole(20 * PAGE + 3) == 20 * PAGE + 3
            assert storage.next_data(20 * PAGE) is None
            hole, data, rest = await storage.find_extents([(5, 10), (3 * PAGE, 64 * PAGE), (20 * PAGE, 21 * PAGE)], 2)
            assert hole == (5, 16 * PAGE, False) and data == (16 * PAGE, 20 * PAGE, True)
            assert rest.start == 20 * PAGE and rest.end >= 64 * PAGE and not rest.is_data
            await storage.write(63 * PAGE, [b"z" * PAGE])
            assert storage.next_hole(63 * PAGE) == 64 * PAGE
            await storage.punch(16 * PAGE, 4 * PAGE)
            assert await read(storage, 15 * PAGE, 6 * PAGE) == bytes(6 * PAGE)
            assert storage.next_data(0) == (16 if kind == "ram, without punch" else 63) * PAGE

    trio.run(main)


@pytest.mark.parametrize("kind", FILES + DEVICES)
def test_behind_the_end_there_is_neither_data_nor_a_hole(opened: Opening) -> None:
    async def main() -> None:
        async with opened(b"z" * 2 * PAGE) as storage:
            assert storage.next_data(2 * PAGE - 1) == 2 * PAGE - 1 and storage.next_hole(0) == 2 * PAGE
            for offset in (2 * PAGE, 2 * PAGE + 1, 1 << 40):
                assert storage.next_data(offset) is None
                with raises_errno(errno.ENXIO):
                    storage.next_hole(offset)
            data, rest = await storage.find_extents([(PAGE, 4 * PAGE)], 5)
            assert data == (PAGE, 2 * PAGE, True) and not rest.is_data
            assert rest.start == 2 * PAGE and rest.end >= 4 * PAGE

    trio.run(main)


@pytest.mark.parametrize("kind", FILES)
def test_a_last_page_in_part(opened: Opening) -> None:
    """Data ends where the file ends, also inside of a page; grown, the rest of the page reads as zeroes."""

    async def main() -> None:
        async with opened(b"z" * (PAGE + 100)) as storage:
            assert storage.next_hole(0) == storage.next_hole(PAGE + 50) == PAGE + 100
            assert storage.next_data(PAGE + 100) is None
            await storage.truncate(PAGE + 10)
            await storage.truncate(3 * PAGE)
            assert await read(storage, PAGE, 2 * PAGE) == b"z" * 10 + bytes(2 * PAGE - 10)

    trio.run(main)


@pytest.mark.parametrize("kind", EXACT)
def test_what_is_held(kind: str, opened: Opening) -> None:
    """The file holds the pages that were written and not given back since: also zeroes, and whole pages for a part."""

    async def main() -> None:
        async with opened(b"") as storage:
            await storage.truncate(64 * PAGE)
            await storage.write(16 * PAGE, [bytes(4 * PAGE)])
            await storage.write(30 * PAGE + 5, [b"z"])
            assert held_bytes(storage) == 5 * PAGE
            await storage.punch(17 * PAGE - 1, PAGE + 2)  # one of them whole
            assert held_bytes(storage) == (5 if kind == "ram, without punch" else 4) * PAGE
            await storage.truncate(16 * PAGE + 1)
            assert held_bytes(storage) == PAGE
            await storage.truncate(0)
            assert held_bytes(storage) == 0

    trio.run(main)


@pytest.mark.parametrize("kind", ["file"])
def test_what_a_real_file_holds(opened: Opening) -> None:
    """As above, but for what the file system needs for itself."""

    async def main() -> None:
        async with opened(b"") as storage:
            await storage.truncate(4096 * PAGE)
            await storage.write(16 * PAGE, [bytes(1024 * PAGE)])
            await storage.sync()
            assert 1024 * PAGE <= held_bytes(storage) < 1100 * PAGE
            await storage.punch(16 * PAGE, 1023 * PAGE)
            await storage.sync()
            assert PAGE <= held_bytes(storage) < 100 * PAGE

    trio.run(main)


@pytest.mark.parametrize("kind", FILES + DEVICES)
def test_deallocate(kind: str, opened: Opening) -> None:
    """All runs read as zeroes, and nothing else has changed, not even in the same page."""

    async def main() -> None:
        async with opened(b"z" * 64 * PAGE) as storage:
            model = bytearray(b"z" * 64 * PAGE)
            runs = [(3 * PAGE, 5 * PAGE), (10 * PAGE + 512, 512), (20 * PAGE - 512, 2 * PAGE), (62 * PAGE, 2 * PAGE)]
            done = await storage.deallocate(runs)
            assert done == (kind != "ram, without punch")
            for offset, size in runs if done else []:
                model[offset : offset + size] = bytes(size)
            assert await read(storage, 0, 64 * PAGE) == model
            assert await storage.deallocate([]) == done
            if done and kind in TELLS:
                assert storage.next_hole(0) == 3 * PAGE and storage.next_data(3 * PAGE) == 8 * PAGE
                assert storage.next_data(62 * PAGE) is None

    trio.run(main)


@pytest.mark.parametrize("kind", FILES + DEVICES)
def test_punch_takes_any_range(opened: Opening) -> None:
    async def main() -> None:
        async with opened(b"z" * 16 * PAGE) as storage:
            model = bytearray(b"z" * 16 * PAGE)
            for offset, size in ((7, 1), (PAGE - 1, 2), (3 * PAGE + 5, 3 * PAGE), (10 * PAGE, PAGE), (15 * PAGE, PAGE)):
                await storage.punch(offset, size)
                model[offset : offset + size] = bytes(size)
                assert await read(storage, 0, 16 * PAGE) == model
            assert storage.size() == 16 * PAGE

    trio.run(main)


@pytest.mark.parametrize("kind", DEVICES)
def test_a_device_does_not_grow(opened: Opening) -> None:
    """Nothing past its end can be read, written or cut; all of it is data, and held."""

    async def main() -> None:
        async with opened(b"x" * 4 * PAGE) as storage:
            size = 4 * PAGE
            assert storage.fixed and storage.size() == held_bytes(storage) == size
            assert stat.S_ISBLK(storage.stat().st_mode)
            with raises_errno(errno.EIO):
                await storage.read_into(size - 1, memoryview(bytearray(2)))
            for offset, data in ((size, b"y"), (size - PAGE, b"y" * 2 * PAGE)):
                with raises_errno(errno.ENOSPC):
                    await storage.write(offset, [data])
            for wanted in (0, size - PAGE, size + PAGE):
                with raises_errno(errno.EINVAL):
                    await storage.truncate(wanted)
            await storage.punch(PAGE, PAGE)
            assert storage.size() == held_bytes(storage) == size
            assert storage.next_data(PAGE) == PAGE and storage.next_hole(PAGE) == size
            [extent] = await storage.find_extents([(0, size)], 5)
            assert extent.start == 0 and extent.end >= size and extent.is_data
            assert await read(storage, 0, 3 * PAGE) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE

    trio.run(main)


@pytest.mark.parametrize("kind", FILES + DEVICES)
def test_errors(opened: Opening) -> None:
    """Not open for writing, closed: EBADF. Closing twice is nothing."""

    async def main() -> None:
        async with opened(b"abc".ljust(PAGE, b"\0"), writable=False) as storage:
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
