"""Whole L2 tables are given back: when they are cut off, and when all that they map is zeroed."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse import commit
from qedfuse.check import CheckResult
from qedfuse.image import Image
from qedfuse.layer import Kind
from tests.helpers.expect import raises_errno
from tests.helpers.history import SECTOR, fill
from tests.helpers.images import (
    TINIEST,
    TINY,
    Chain,
    assert_qemu_agrees,
    assert_sound,
    contents,
    new_chain,
    open_chain,
    raw_file,
)
from tests.helpers.ram import Chaos, RamFile, RamStorage

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
def test_what_is_cut_off_leaves_no_table(backing: bool, tmp_path: Path) -> None:
    async def main() -> None:
        chain, image = await full_image(backing=backing)
        await image.resize(2 * CLUSTER + SECTOR)
        assert image.tables.l2.pages.keys() == {0, 1}
        result = await closed(chain, image)
        assert result.past_end_clusters == result.punched_clusters == 0
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
        assert await image.tables.table(0)
        assert not await image.tables.table(1) and not await image.tables.table(2)
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


@pytest.mark.parametrize("size", [3 * TABLE, 2 * TABLE + 5 * CLUSTER + SECTOR])
@pytest.mark.parametrize("how", ["zero", "discard"])
def test_zeroing_all_leaves_a_file_as_new(how: str, size: int, tmp_path: Path) -> None:
    async def main() -> None:
        chain, image = await full_image(size)
        size_now = image.size
        await (image.zero if how == "zero" else image.discard)(0, size_now)
        assert not image.tables.l2.pages
        assert not any(await image.read(0, size_now))
        await closed(chain, image)
        assert chain.file.size == fresh
        assert_qemu_agrees(chain, bytes(size_now), tmp_path, leaks=False)

    fresh = fresh_size()
    trio.run(main)


def test_zeroing_a_part_keeps_the_rest() -> None:
    """Tables at both ends of the range stay, with what they map outside of it."""

    async def main() -> None:
        chain, image = await full_image()
        expected = bytearray(await image.read(0, image.size))
        await image.zero(2 * CLUSTER, 2 * TABLE)
        expected[2 * CLUSTER : 2 * TABLE + 2 * CLUSTER] = bytes(2 * TABLE)
        assert await image.tables.table(0) and not await image.tables.table(1) and await image.tables.table(2)
        assert await image.read(0, image.size) == expected
        await image.write(TABLE + SECTOR, b"y" * SECTOR)
        expected[TABLE + SECTOR : TABLE + 2 * SECTOR] = b"y" * SECTOR
        await closed(chain, image)
        assert await contents(chain) == expected

    trio.run(main)


def test_over_a_backing_file_tables_of_zeroes_stay() -> None:
    async def main() -> None:
        chain, image = await full_image(backing=True)
        await image.zero(0, 3 * TABLE)
        assert await image.tables.table(0)
        assert not any(await image.read(0, 3 * TABLE))
        await closed(chain, image)
        assert not any(await contents(chain))

    trio.run(main)


def test_a_table_that_waits_to_be_written_stays() -> None:
    """Changed, new, or in a commit that is running: its entries are changed instead."""

    async def main() -> None:
        chain, image = await full_image()
        await image.write(TABLE + 9 * CLUSTER, b"changed")
        await image.zero(TABLE, TABLE)
        assert await image.tables.table(1)
        await image.flush()
        await image.zero(TABLE, TABLE)
        assert not await image.tables.table(1)
        await image.write(TABLE, b"new")
        await image.zero(TABLE, TABLE)
        assert await image.tables.table(1)
        image.storage.chaos = Chaos(1, refuse=0, yields=50)  # type: ignore[attr-defined]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.flush)
            while image.tables.dirty_l2:
                await trio.lowlevel.checkpoint()
            await image.zero(TABLE, TABLE)
            assert await image.tables.table(1)
        assert not any(await image.read(TABLE, TABLE))
        assert (await closed(chain, image)).leaks == 0

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
        storage.offset = await image.tables.table(2)
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
    """The error is told, the image is smaller all the same, and what the table maps is leaked, not lost."""

    async def main() -> None:
        chain, image = await full_image()
        offset = await image.tables.table(2)
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
        result = await assert_sound(chain.file, leaks=True)
        assert result.leaks == 2 + 4

    trio.run(main)


def test_entries_that_point_nowhere_are_passed_over() -> None:
    async def main() -> None:
        chain, image = await full_image()
        table = await image.tables.table(1)
        await image.close()
        for entry, value in ((500, 1), (501, CLUSTER + 7), (502, 1 << 62), (503, 0x1000 * 999), (504, 3)):
            chain.file.write(table + 8 * entry, struct.pack("<Q", value))
        image = await open_chain(chain)
        await image.resize(TABLE)
        result = await closed(chain, image)
        assert result.leaks == 0

    trio.run(main)


def test_the_freed_runs_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other cluster of many tables, so that nothing adjoins: whoever cuts them off commits in between."""
    monkeypatch.setattr(commit, "_MAX_RELEASED_RUNS", 100)

    async def main() -> None:
        size = 20 * TINIEST.l2_coverage
        chain = await new_chain(size, TINIEST)
        image = await open_chain(chain)
        for start in range(0, size, TINIEST.l2_coverage):
            await image.write(start + CLUSTER, b"x" * 60 * CLUSTER)
            for cluster in range(1, 61, 2):
                await image.discard(start + cluster * CLUSTER, CLUSTER)
        await image.flush()
        await image.flush()
        allocator = image._writer._allocator
        most = 0
        take = allocator.take_released

        def counting() -> object:
            nonlocal most
            most = max(most, allocator.released_runs)
            return take()

        monkeypatch.setattr(allocator, "take_released", counting)
        await image.resize(0)
        await closed(chain, image)
        assert 100 < most <= 140

    trio.run(main)
