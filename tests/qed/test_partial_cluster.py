"""What the engine makes of a last cluster of which the file has only a part, as a table may say that it is in use.

An image with one is not opened for writing (`recovery.py`). The engine by itself relies on that no further than that
nothing wrong is read or acknowledged: what is missing is an error, what is written makes the file longer, inside of the
cluster, and where a file cannot be longer it is EFBIG.
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_image
from qedfuse.chain.recovery import recover
from qedfuse.errors import CorruptError, QedfuseError
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.storage import Storage
from qedfuse.qed.header import Header
from qedfuse.qed.image import Image
from tests.helpers.doubles.ram import RamFile, RamStorage
from tests.helpers.images.images import POOL, read_header

C = 4096
HEADER = Header(C, 2, 1, 0, 0, 0, C, 1 << 20)
#: Header, L1 table, an L2 table, one cluster.
L2, DATA = 3 * C, 5 * C
LARGEST = (1 << 63) - 1


def pieces(data: int) -> dict[int, bytes]:
    """An image whose guest cluster 0 is at `DATA` and 1 at `data`."""
    return {0: HEADER.encode(), C: struct.pack("<Q", L2), L2: struct.pack("<QQ", DATA, data), DATA: b"whole" * 819}


def in_ram(data: int, size: int) -> RamStorage:
    file = RamFile()
    for offset, piece in pieces(data).items():
        file.write(offset, piece)
    if data < size < data + C:
        file.write(data, b"p" * min(1000, size - data))
    file.truncate(size)
    return RamStorage("image", file)


def on_disk(path: Path, data: int, size: int) -> FileStorage:
    with path.open("wb") as file:
        for offset, piece in pieces(data).items():
            file.seek(offset)
            file.write(piece)
        file.seek(data)
        file.write(b"p" * 1000)
        file.truncate(size)
    return FileStorage.open(path, writable=True)


@pytest.mark.parametrize("kind", ["ram", "file"])
def test_the_engine_by_itself(tmp_path: Path, kind: str) -> None:
    last = DATA + C
    storage: Storage = in_ram(last, last + 1000) if kind == "ram" else on_disk(tmp_path / "i.qed", last, last + 1000)

    async def main() -> None:
        image = Image(storage, HEADER, None, writable=True, pool=POOL)
        assert await image.read(C, 1000) == b"p" * 1000
        assert await image.read(C, 1024) == b"p" * 1000 + bytes(24)
        with pytest.raises(QedfuseError, match="unexpected end of file"):
            await image.read(C, C)
        await image.write(C + 2000, b"new")
        assert storage.size() == last + 2003
        assert await image.read(C, 2003) == b"p" * 1000 + bytes(1000) + b"new"
        await image.write(40 * C, b"elsewhere")  # in a cluster of its own
        await image.flush()
        assert await image.read(C, C) == (b"p" * 1000 + bytes(1000) + b"new").ljust(C, b"\0")
        assert await image.read(40 * C, 9) == b"elsewhere"
        await image.close()

    trio.run(main)


@pytest.mark.parametrize("size", [LARGEST, LARGEST - 127, LARGEST - 2000])
def test_at_the_largest_offset(size: int) -> None:
    """A file cannot be longer: the cluster has no end, on whatever host."""
    last = LARGEST // C * C
    storage = in_ram(last, size)

    async def main() -> None:
        with pytest.raises(CorruptError, match="cut off"):
            await recover(storage, read_header(storage.file))
        image = Image(storage, HEADER, None, writable=True, pool=POOL)
        before = storage.file.key()
        for at, length in ((0, C), (C - 100, 100)):
            with pytest.raises(OSError, match=r".") as caught:
                await image.write(C + at, b"x" * length)
            assert caught.value.errno == errno.EFBIG
        with pytest.raises(OSError, match=r".") as caught:
            await image.write(9 * C, b"x")  # nor has it room for another one
        assert caught.value.errno == errno.EFBIG
        assert storage.file.key() == before
        await image.write(0, b"in place")
        assert await image.read(0, 8) == b"in place"

    trio.run(main)


@pytest.mark.parametrize("size", [LARGEST, LARGEST - 2000])
def test_a_last_part_that_is_not_in_use(size: int) -> None:
    storage = in_ram(DATA + C, size)

    async def main() -> None:
        assert await recover(storage, HEADER) == HEADER
        assert storage.size() == size

    trio.run(main)


def test_what_users_see(tmp_path: Path) -> None:
    path = tmp_path / "disk.qed"

    async def main() -> None:
        await on_disk(path, DATA + C, DATA + C + 1000).close()
        async with open_image(path, read_only=True) as image:
            assert (await image.read(0, 5)) == b"whole"
            with pytest.raises(CorruptError, match="no cluster of the file"):
                await image.read(C, 1)
        with pytest.raises(CorruptError, match="the file is cut off inside of what is in use"):
            async with open_image(path):
                pass
        assert os.stat(path).st_size == DATA + C + 1000

    trio.run(main)
