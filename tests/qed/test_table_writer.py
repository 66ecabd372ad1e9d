"""A new image that is filled front to back: what is taken is found again, each page of its tables is written once, and
nothing is leaked."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import trio

from qedfuse.check.check import check_image
from qedfuse.host.storage import Buffer
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import HEADER_BYTES, Header
from qedfuse.qed.image import Image
from qedfuse.qed.new_image import new_header, write_image
from qedfuse.qed.table_writer import SequentialWriter
from qedfuse.sizes import GuestOffset
from tests.helpers.doubles.ram import RamStorage

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
#: The smallest tables; chunks that are parts of a table; the default.
GEOMETRIES = [Geometry(4 * KIB, 1), Geometry(4 * KIB, 2), Geometry(64 * KIB, 16), Geometry()]


class Recorder(RamStorage):
    """Remembers where it was written."""

    def __init__(self) -> None:
        super().__init__("new")
        self.written: list[tuple[int, int]] = []

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.written.append((offset, offset + sum(map(len, buffers))))
        await super().write(offset, buffers)


async def fill(storage: Recorder, size: int, geometry: Geometry, ranges: list[tuple[int, int]]) -> dict[int, bytes]:
    """A new image with data in these guest ranges (start, end). Returns what a sector at each place's start says."""
    header = new_header("new", size, geometry)
    await write_image(storage, header)
    storage.written.clear()
    writer = SequentialWriter(storage, header)
    model: dict[int, bytes] = {}
    for start, end in ranges:
        while start < end:
            host, length = writer.place(GuestOffset(start), end - start)
            assert 0 < length <= end - start
            assert writer.place(GuestOffset(start), end - start) == (host, length)
            model[start] = data = start.to_bytes(8, "little") * 64
            storage.file.write(host, data)
            await writer.take(GuestOffset(start), length)
            start += length
    await writer.finish()
    await storage.truncate(writer.end)
    return model


async def verify(storage: Recorder, model: dict[int, bytes]) -> None:
    header = Header.decode(storage.file.read(0, HEADER_BYTES), "new")
    found = await check_image(storage, header)
    assert (found.corruptions, found.leaks, found.check_errors) == (0, 0, 0), found
    pages = [page for start, end in storage.written for page in range(start // 4096, end // 4096)]
    assert len(pages) == len(set(pages))
    image = Image(storage, header, None, writable=False)
    for offset, data in model.items():
        assert await image.read(offset, 512) == data


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_what_is_taken_is_found(geometry: Geometry, seed: int) -> None:
    """Ranges that begin and end inside clusters, meet in one, and jump over tables."""
    rnd = random.Random(seed)
    size = min(geometry.max_image_size, 40 * geometry.l2_coverage)
    ranges, position = [], 0
    for _ in range(40):
        start = position + rnd.choice([0, 0, 512, geometry.cluster_size, geometry.l2_coverage])
        end = start + rnd.choice([512, 5 * 512, geometry.cluster_size, 3 * geometry.cluster_size, 2 * MIB])
        if rnd.random() < 0.5:
            end = -(-end // geometry.cluster_size) * geometry.cluster_size
        if end > size:
            break
        ranges.append((start, end))
        position = end

    async def main() -> None:
        storage = Recorder()
        await verify(storage, await fill(storage, size, geometry, ranges))

    trio.run(main)


def test_a_full_table_is_one_run() -> None:
    """Gigabytes are placed by a few calls, whatever their number of clusters."""

    async def main() -> None:
        storage = Recorder()
        model = await fill(storage, 100 * GIB, Geometry(), [(0, 100 * GIB)])
        assert len(model) == 50
        assert len(storage.written) == 51
        await verify(storage, model)

    trio.run(main)


def test_nothing_is_nothing() -> None:
    async def main() -> None:
        storage = Recorder()
        await verify(storage, await fill(storage, GIB, Geometry(), []))
        assert storage.written == []
        assert storage.size() == 5 * 64 * KIB

    trio.run(main)


def test_order_is_the_callers_business() -> None:
    async def main() -> None:
        writer = SequentialWriter(Recorder(), new_header("new", GIB, Geometry()))
        await writer.take(GuestOffset(MIB), writer.place(GuestOffset(MIB), 512)[1])
        with pytest.raises(AssertionError):
            writer.place(GuestOffset(0), 512)

    trio.run(main)
