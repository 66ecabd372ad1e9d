"""A file that ends inside a cluster, to which only a table refers that the check does not follow."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_image
from qedfuse.errors import CorruptError
from tests.helpers.judges.expect import raises_errno
from tests.helpers.qemu.cli import qemu_img

CLUSTER = 64 << 10
COVERAGE = 1 << 30
ENTRY = struct.Struct("<Q")


def test_it_is_not_opened_for_writing(tmp_path: Path) -> None:
    """What was an error would be half zeroes after the next allocation."""
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", "-o", f"cluster_size={CLUSTER},table_size=2", path, 2 * COVERAGE)

    async def write() -> None:
        async with open_image(path) as image:
            for offset in (0, COVERAGE, COVERAGE + CLUSTER):
                await image.write(offset, b"d" * CLUSTER)

    async def look(*, read_only: bool) -> None:
        async with open_image(path, read_only=read_only) as image:
            assert await image.read(0, CLUSTER) == b"d" * CLUSTER
            with raises_errno(5):
                await image.read(COVERAGE + CLUSTER, CLUSTER)

    trio.run(write)
    with path.open("r+b") as file:
        file.seek(40)
        file.seek(ENTRY.unpack(file.read(8))[0])
        first, second = struct.unpack("<QQ", file.read(16))
        file.seek(second + 8)
        last = ENTRY.unpack(file.read(8))[0]
        assert last + CLUSTER == os.fstat(file.fileno()).st_size
        file.seek(first + 8)
        file.write(ENTRY.pack(second))  # data of the first table's: the second overlaps it
        file.truncate(last + 20480)
    before = path.read_bytes()
    with pytest.raises(CorruptError, match="ends inside a cluster"):
        trio.run(lambda: look(read_only=False))
    assert path.read_bytes() == before
    trio.run(lambda: look(read_only=True))
