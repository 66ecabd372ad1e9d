"""What is left of a file whose image was cut short: holes, and no tail; and what zeroing all of it leaves."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.check.result import CheckResult
from qedfuse.layers.runs import Kind
from qedfuse.qed.image import Image
from qedfuse.sizes import TableIndex
from tests.helpers.doubles.ram import RamFile, RamStorage
from tests.helpers.images.images import (
    TINY,
    Chain,
    assert_qemu_agrees,
    assert_sound,
    contents,
    new_chain,
    open_chain,
    raw_file,
)
from tests.helpers.judges.expect import raises_errno
from tests.helpers.judges.history import SECTOR, fill

CLUSTER = 4096
TABLE = TINY.l2_coverage
BACKED = pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])


async def full_image(size: int = 3 * TABLE, *, backing: bool = False) -> tuple[Chain, Image]:
    """Data in every table, some of it in runs, and all of it durable."""
    below = [(raw_file(fill(0xBACC, 0, 2 * CLUSTER)), "raw")] if backing else []
    chain = await new_chain(size, TINY, below)
    image = await open_chain(chain)
    for start in range(0, size, TABLE):
        await image.write(start, fill(1, start, 3 * CLUSTER))
        await image.write(start + TABLE - CLUSTER, fill(1, start, CLUSTER))
    await image.flush()
    return chain, image


async def closed(chain: Chain, image: Image) -> CheckResult:
    await image.close()
    return await assert_sound(chain.file)


def fresh_size() -> int:
    return trio.run(new_chain, TABLE, TINY).file.size


@BACKED
def test_what_is_cut_off_leaves_no_tail(backing: bool, tmp_path: Path) -> None:
    async def main() -> None:
        chain, image = await full_image(backing=backing)
        await image.resize(2 * CLUSTER + SECTOR)
        assert image.tables.l2.pages.keys() <= {0, 1}
        await closed(chain, image)
        # The first table's last cluster, which was written behind its first ones.
        assert chain.file.size == fresh + TINY.table_bytes + 3 * CLUSTER
        assert_qemu_agrees(chain, fill(1, 0, 2 * CLUSTER + SECTOR), tmp_path, leaks=False)

    fresh = fresh_size()
    trio.run(main)


@BACKED
def test_a_table_on_the_boundary(backing: bool) -> None:
    """The new end is where a table begins, the old one inside another: one stays whole, all others go."""

    async def main() -> None:
        chain, image = await full_image(2 * TABLE + 9 * CLUSTER, backing=backing)
        await image.write(2 * TABLE + 5 * CLUSTER, b"x")
        await image.resize(TABLE)
        assert await image.tables.table(TableIndex(0))
        assert not await image.tables.table(TableIndex(1)) and not await image.tables.table(TableIndex(2))
        await image.resize(3 * TABLE)
        assert not any(await image.read(TABLE, 2 * TABLE))
        assert (await closed(chain, image)).leaks == 0

    trio.run(main)


def test_cutting_all_off_leaves_a_file_as_new() -> None:
    async def main() -> None:
        chain, image = await full_image()
        await image.resize(0)
        await closed(chain, image)
        assert chain.file.size == fresh

    fresh = fresh_size()
    trio.run(main)


@BACKED
def test_what_lies_among_others_becomes_holes(backing: bool, tmp_path: Path) -> None:
    """A table that is cut off, before data that stays, and one behind it that refers to what lies before: both stay,
    as does what they map, without its contents. What lies behind all that is given up."""

    async def main() -> None:
        below = [(raw_file(fill(0xBACC, 0, 2 * CLUSTER)), "raw")] if backing else []
        chain = await new_chain(3 * TABLE, TINY, below)
        image = await open_chain(chain)
        await image.write(2 * TABLE, fill(1, 0, CLUSTER))
        await image.write(TABLE + CLUSTER, fill(2, 0, CLUSTER))
        await image.write(0, fill(3, 0, CLUSTER))
        await image.flush()
        before = image.stats().file_end_bytes
        await image.write(2 * TABLE + CLUSTER, fill(4, 0, 4 * CLUSTER))
        await image.flush()
        await image.resize(CLUSTER)
        assert image.stats().file_end_bytes == before
        result = await closed(chain, image)
        assert result.past_end_clusters == 2 * TINY.table_size + 2
        held = len(chain.file.pages) * CLUSTER
        assert held <= CLUSTER + 2 * TINY.table_bytes + 2 * TINY.table_bytes + CLUSTER
        assert_qemu_agrees(chain, fill(3, 0, CLUSTER), tmp_path, leaks=False)
        image = await open_chain(chain)
        await image.resize(3 * TABLE)
        assert not any(await image.read(CLUSTER, 3 * TABLE))
        await image.write(2 * TABLE + 2 * SECTOR, b"again")
        await closed(chain, image)
        expected = bytearray(fill(3, 0, CLUSTER).ljust(3 * TABLE, b"\0"))
        expected[2 * TABLE + 2 * SECTOR : 2 * TABLE + 2 * SECTOR + 5] = b"again"
        assert_qemu_agrees(chain, bytes(expected), tmp_path, leaks=False)

    trio.run(main)


@pytest.mark.parametrize("size", [3 * TABLE, 2 * TABLE + 5 * CLUSTER + SECTOR])
@pytest.mark.parametrize("how", ["zero", "discard"])
@BACKED
def test_zeroing_all_keeps_the_mapping_and_no_data(how: str, size: int, backing: bool, tmp_path: Path) -> None:
    async def main() -> None:
        chain, image = await full_image(size, backing=backing)
        end, changes = image.stats().file_end_bytes, image.stats().dirty_pages
        size_now = image.size
        await (image.zero if how == "zero" else image.discard)(0, size_now)
        if not backing:
            assert image.stats().dirty_pages == changes == 0
        assert not any(await image.read(0, size_now))
        await image.write(TABLE + SECTOR, b"again")
        await image.flush()
        assert image.stats().file_end_bytes == end
        await image.zero(0, size_now)
        await closed(chain, image)
        assert all(not any(page) or index * CLUSTER < chain.file.size for index, page in chain.file.pages.items())
        assert_qemu_agrees(chain, bytes(size_now), tmp_path, leaks=False)

    trio.run(main)


def test_zeroing_what_is_zero_costs_no_sync() -> None:
    async def main() -> None:
        chain = await new_chain(3 * TABLE, TINY)
        storage = RamStorage("image", chain.file)
        image = await open_chain(chain, storage)
        await image.write(0, b"x")
        await image.flush()
        version, syncs = image.version, storage.syncs
        await image.zero(CLUSTER, image.size)
        await image.discard(TABLE, TABLE)
        assert image.version == version
        await image.flush()
        assert storage.syncs == syncs
        await closed(chain, image)

    trio.run(main)


def test_zeroing_a_part_keeps_the_rest() -> None:
    async def main() -> None:
        chain, image = await full_image()
        expected = bytearray(await image.read(0, image.size))
        await image.zero(2 * CLUSTER, 2 * TABLE)
        expected[2 * CLUSTER : 2 * TABLE + 2 * CLUSTER] = bytes(2 * TABLE)
        assert await image.read(0, image.size) == expected
        await image.write(TABLE + SECTOR, b"y" * SECTOR)
        expected[TABLE + SECTOR : TABLE + 2 * SECTOR] = b"y" * SECTOR
        await closed(chain, image)
        assert await contents(chain) == expected

    trio.run(main)


@BACKED
@pytest.mark.parametrize("cut", [False, True])
def test_where_the_host_cannot_punch(backing: bool, cut: bool, tmp_path: Path) -> None:
    """The entries go, and the clusters are leaked."""

    async def main() -> None:
        chain, image = await full_image(backing=backing)
        await image.close()
        image = await open_chain(chain, RamStorage("image", chain.file, punches=False))
        await image.write(TABLE + 9 * CLUSTER, b"not for long")
        await (image.resize(TABLE) if cut else image.zero(TABLE, 2 * TABLE))
        if cut:
            await image.resize(3 * TABLE)
        assert not any(await image.read(TABLE, 2 * TABLE))
        assert await image.read(0, 2 * CLUSTER) == fill(1, 0, 2 * CLUSTER)
        await image.close()
        result = await assert_sound(chain.file, leaks=True)
        assert result.leaks == (0 if cut else 9)  # what is the file's tail can go without being punched
        expected = fill(1, 0, 3 * CLUSTER).ljust(TABLE - CLUSTER, b"\0") + fill(1, 0, CLUSTER)
        assert_qemu_agrees(chain, expected.ljust(3 * TABLE, b"\0"), tmp_path, leaks=not cut)

    trio.run(main)


class Gate(RamStorage):
    """Holds the first read of the page at `offset` back until `open` is set."""

    def __init__(self, file: RamFile) -> None:
        super().__init__("image", file)
        self.offset = -1
        self.open = trio.Event()

    def read_into_nowait(self, offset: int, target: memoryview) -> bool:
        return offset != self.offset and super().read_into_nowait(offset, target)

    async def read_into(self, offset: int, target: memoryview) -> None:
        await super().read_into(offset, target)
        if offset == self.offset:
            self.offset = -1
            await self.open.wait()


@pytest.mark.parametrize("refilled", [False, True])
def test_a_page_that_is_being_read_while_its_table_goes(refilled: bool) -> None:
    """Asking for the map takes no lock: what it was about to find must not be found by anybody later."""

    async def main() -> None:
        chain, image = await full_image()
        await image.close()
        storage = Gate(chain.file)
        image = await open_chain(chain, storage)
        storage.offset = await image.tables.table(TableIndex(2))
        found: list[Kind] = []

        async def ask() -> None:
            found.append((await image.map(2 * TABLE, CLUSTER))[0].kind)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)  # waits for the same page
            await wait_all_tasks_blocked()
            await image.resize(TABLE)
            await image.resize(3 * TABLE)
            if refilled:
                await image.write(2 * TABLE + CLUSTER, b"new")
            storage.open.set()
        assert found == [Kind.UNALLOCATED] * 2
        assert not any(await image.read(2 * TABLE, CLUSTER))
        assert (await image.read(2 * TABLE + CLUSTER, 3)) == (b"new" if refilled else bytes(3))
        assert (await closed(chain, image)).leaks == 0

    trio.run(main)


def test_a_table_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is told, the image is smaller all the same, and another resize makes up for it."""

    async def main() -> None:
        chain, image = await full_image()
        offset = await image.tables.table(TableIndex(2))
        original = RamStorage.read_into_nowait

        def bad(self: RamStorage, position: int, target: memoryview) -> bool:
            if position == offset:
                raise OSError(errno.EIO, "no")
            return original(self, position, target)

        with monkeypatch.context() as patch:
            patch.setattr(RamStorage, "read_into_nowait", bad)
            image.tables.l2.clear()
            with raises_errno(errno.EIO):
                await image.resize(CLUSTER)
            assert image.size == CLUSTER
        await image.resize(3 * TABLE)
        assert not any(await image.read(CLUSTER, 3 * TABLE))
        await image.close()
        await assert_sound(chain.file)

    trio.run(main)


def test_entries_that_point_nowhere_are_passed_over() -> None:
    async def main() -> None:
        chain, image = await full_image()
        table = await image.tables.table(TableIndex(1))
        await image.close()
        for entry, value in ((500, 1), (501, CLUSTER + 7), (502, 1 << 62), (503, 0x1000 * 999), (504, 3)):
            chain.file.write(table + 8 * entry, struct.pack("<Q", value))
        image = await open_chain(chain)
        await image.resize(TABLE)
        result = await closed(chain, image)
        assert result.leaks == 0

    trio.run(main)


@pytest.mark.parametrize("what", ["table", "data", "table as data", "everything"])
def test_what_is_also_in_use_is_not_cut_off(what: str) -> None:
    """A corrupt image refers to a cluster from both sides of its new end. The file keeps it, and all that lies before,
    and the image can be read as far as its tables lie inside of the file."""

    async def main() -> None:
        chain, image = await full_image()
        l1 = image.header.l1_table_offset
        await image.close()
        raw = chain.file
        first, second, last = struct.unpack("<3Q", raw.read(l1, 24))
        (data,) = struct.unpack("<Q", raw.read(last, 8))
        if what == "table":
            raw.write(l1, struct.pack("<Q", last))
        elif what == "everything":
            raw.write(second + 64, struct.pack(f"<{raw.size // CLUSTER - 1}Q", *range(CLUSTER, raw.size, CLUSTER)))
        else:
            raw.write(first + 64, struct.pack("<Q", data if what == "data" else last))
        (table,) = struct.unpack("<Q", raw.read(l1, 8))
        inside = struct.unpack(f"<{TINY.table_entries}Q", raw.read(table, TINY.table_bytes))
        image = Image(RamStorage("image", raw), image.header, None, writable=True)
        await image.resize(TABLE)
        await image.close()
        assert raw.size >= max(table + TINY.table_bytes, max(inside) + CLUSTER)
        assert len(await contents(chain)) == TABLE

    trio.run(main)
