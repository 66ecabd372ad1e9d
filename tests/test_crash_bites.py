"""Crash enumeration bites: each test breaks the order of writes in one place, and some state must be judged bad."""

from __future__ import annotations

import random

import pytest

from qedfuse import growth as growing
from qedfuse.allocator import Allocator
from qedfuse.clusters import ClusterWriter
from qedfuse.commit import Committer
from qedfuse.errors import CorruptError
from qedfuse.geometry import UNALLOCATED, round_up
from qedfuse.header import FEATURE_NEED_CHECK
from qedfuse.image import Image
from qedfuse.pages import PageMap
from qedfuse.tables import Tables
from tests.helpers.crash import SEED
from tests.helpers.history import Guest
from tests.helpers.scenarios import allocate, churn, cut, grow, idle, reuse, run_scenario, shrink, shrink_and_grow
from tests.helpers.schedule import run_seeded
from tests.helpers.survival import BAD, Scenario
from tests.helpers.table_scenarios import TABLE_SCENARIOS, cut_and_fill_again, cut_tables, run_tables, zero_tables


@pytest.fixture(autouse=True)
def growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file grows by what is needed, so that it often does."""
    monkeypatch.setattr(growing, "_GROW_CLUSTERS", 0)


def expect_failure(scenario: Scenario, backing: str) -> None:
    """The scenario must have a state that is judged bad."""

    async def main() -> None:
        run = await (run_tables if scenario in TABLE_SCENARIOS else run_scenario)(scenario, backing)
        await run.enumerate(random.Random(SEED), complete=1024, samples=4000)

    with pytest.raises((AssertionError, CorruptError), match=BAD):
        run_seeded(SEED, main)


@pytest.mark.parametrize("backing", ["shorter", "longer"])
def test_tables_before_the_barrier(monkeypatch: pytest.MonkeyPatch, backing: str) -> None:
    """With a backing file: no sync between the data and the L2 page."""
    original = Committer.__init__

    def broken(self: Committer, *arguments: object, barrier: bool) -> None:
        original(self, *arguments, barrier=False)  # type: ignore[arg-type]

    async def no_mark(self: Committer) -> None:
        pass

    monkeypatch.setattr(Committer, "__init__", broken)
    monkeypatch.setattr(Committer, "_mark", no_mark)
    expect_failure(allocate, backing)


def test_tables_swapped_with_the_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages go before the barrier instead of behind it."""
    original = Committer._commit

    async def broken(self: Committer, durable: bool) -> None:
        tables = self._tables
        tables.new_tables.update(dict.fromkeys(range(tables.geometry.table_entries), 0))
        await original(self, durable)

    monkeypatch.setattr(Committer, "_commit", broken)
    expect_failure(allocate, "longer")


def test_l1_before_the_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new table's L1 entry goes to the file while the table may still lie outside it."""
    original = Committer._write_pages

    async def broken(self: Committer, group: list[object]) -> None:
        tables = self._tables
        level = tables.l1
        await original(self, [(level, i, level.hosts[i], bytes(level.pages[i])) for i in sorted(level.pinned)])
        await original(self, group)  # type: ignore[arg-type]

    monkeypatch.setattr(Committer, "_write_pages", broken)
    expect_failure(allocate, "longer")


@pytest.mark.parametrize("backing", ["alone", "longer"])
def test_reuse_without_waiting(monkeypatch: pytest.MonkeyPatch, backing: str) -> None:
    """A freed cluster comes back before the entry that freed it is durable."""
    monkeypatch.setattr(Allocator, "release", lambda self, offset, size: self._free.add(offset, size))
    expect_failure(churn, backing)


def test_reuse_before_the_entry_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Punched first (so nothing stale shows), but the old entry may still be in the file."""

    async def punch_now(guest: Guest) -> None:
        allocator = guest.image._committer._allocator  # type: ignore[union-attr]

        def release(offset: int, size: int) -> None:
            guest.image.storage.apply_punch(offset, size)  # type: ignore[attr-defined]
            allocator._free.add(offset, size)

        allocator.release = release  # type: ignore[method-assign]
        await churn(guest)

    expect_failure(punch_now, "longer")


def test_reuse_before_the_punch_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a backing file: the stale contents of a recycled cluster show beside what was written."""
    monkeypatch.setattr(Allocator, "add_punched", lambda self, offset, size: self._free.add(offset, size))
    expect_failure(churn, "alone")


def test_reuse_without_punching(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_punch(self: Committer, released: list[tuple[int, int]]) -> None:
        for offset, size in released:
            self._allocator.add_punched(offset, size)

    monkeypatch.setattr(Committer, "_punch", no_punch)
    expect_failure(reuse, "alone")


@pytest.mark.parametrize("scenario", [allocate, reuse], ids=lambda scenario: scenario.__name__)
def test_no_need_check(monkeypatch: pytest.MonkeyPatch, scenario: Scenario) -> None:
    """Without a backing file and without the mark, nobody repairs the entries that point outside the file."""

    async def no_mark(self: Committer) -> None:
        pass

    monkeypatch.setattr(Committer, "_mark", no_mark)
    expect_failure(scenario, "alone")


def test_mark_without_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lazy_mark(self: Committer) -> None:
        if not self._barrier and not self.header.needs_check:
            self.header = self.header.with_feature(FEATURE_NEED_CHECK, True)
            await self._storage.write(0, [self.header.encode()])

    monkeypatch.setattr(Committer, "_mark", lazy_mark)
    expect_failure(allocate, "alone")


def test_clean_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """NEED_CHECK is cleared before the tables are durable."""
    original = Committer.clean

    async def broken(self: Committer) -> None:
        self.header = self.header.with_feature(FEATURE_NEED_CHECK, False)
        await self._storage.write(0, [self.header.encode()])
        await original(self)

    monkeypatch.setattr(Committer, "clean", broken)
    expect_failure(idle, "alone")


def test_flush_without_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush that only writes back."""
    monkeypatch.setattr(Committer, "flush", Committer.write_back)
    expect_failure(allocate, "alone")


@pytest.mark.parametrize("backing", ["alone", "longer"])
def test_shrink_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch, backing: str) -> None:
    """The entries are dropped before the smaller size is durable."""

    async def broken(self: Image, size: int) -> None:
        old, self._size = self._size, size
        await self._clear(size, old, UNALLOCATED)
        await self._committer_of().shrink(size)

    monkeypatch.setattr(Image, "_shrink", broken)
    expect_failure(shrink, backing)


def test_grow_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger size is written before the entries that hide the backing file."""
    original = Image._grow

    async def broken(self: Image, size: int) -> None:
        committer = self._committer_of()
        await committer._write_header(committer.header.with_image_size(size))
        await original(self, size)

    monkeypatch.setattr(Image, "_grow", broken)
    expect_failure(grow, "longer")


def test_grow_without_hiding_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: ClusterWriter, image_end: int, *, growing: bool) -> None:
        pass

    monkeypatch.setattr(ClusterWriter, "clear_tail", nothing)
    expect_failure(shrink_and_grow, "alone")


def test_shrink_to_whole_sectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut off inside of a sector stays."""
    original = Image._shrink

    async def rounded(self: Image, end: int) -> None:
        await original(self, round_up(end, 512))

    monkeypatch.setattr(Image, "_shrink", rounded)
    expect_failure(cut, "alone")


def test_shrink_before_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut off is zeroed while the image may still have it after a crash."""
    original = Image._shrink

    async def early(self: Image, end: int) -> None:
        await self._writer.clear_tail(round_up(end, 512), growing=False)
        await original(self, end)

    monkeypatch.setattr(Image, "_shrink", early)
    expect_failure(shrink, "alone")


# -- whole tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scenario", "backing"), [(cut_tables, "shorter"), (zero_tables, "alone")])
def test_tables_reused_without_waiting(monkeypatch: pytest.MonkeyPatch, scenario: Scenario, backing: str) -> None:
    """The clusters of a dropped table, and those it maps, come back while the file still leads to them."""
    monkeypatch.setattr(Allocator, "release", lambda self, offset, size: self._free.add(offset, size))
    expect_failure(scenario, backing)


@pytest.mark.parametrize(("scenario", "backing"), [(cut_tables, "shorter"), (zero_tables, "alone")])
def test_tables_dropped_from_the_file_too_late(
    monkeypatch: pytest.MonkeyPatch, scenario: Scenario, backing: str
) -> None:
    """What a dropped table mapped is released in one commit, its L1 entry is written two commits later."""
    held: list[tuple[int, int]] = []
    drop, commit_once = Tables.drop_table, Committer._commit

    def broken_drop(self: Tables, l1_index: int) -> None:
        drop(self, l1_index)
        self.dirty_l1.clear()  # there is only one page in these
        held.append((2, 0))

    async def broken_commit(self: Committer, durable: bool) -> None:
        if held:
            self._tables.dirty_l1.clear()
        await commit_once(self, durable)
        held[:] = [(left - 1, page) for left, page in held if left]
        if not held:
            self._tables.dirty_l1.update(self._tables.l1.pinned)

    monkeypatch.setattr(Tables, "drop_table", broken_drop)
    monkeypatch.setattr(Committer, "_commit", broken_commit)
    expect_failure(scenario, backing)


@pytest.mark.parametrize(("scenario", "backing"), [(cut_and_fill_again, "shorter"), (zero_tables, "alone")])
def test_dropped_tables_stay_in_memory(monkeypatch: pytest.MonkeyPatch, scenario: Scenario, backing: str) -> None:
    """Changes go to pages whose place in the file is somebody else's."""

    def broken(self: Tables, l1_index: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(PageMap, "drop", lambda *_: None)
            original(self, l1_index)

    original = Tables.drop_table
    monkeypatch.setattr(Tables, "drop_table", broken)
    expect_failure(scenario, backing)


@pytest.mark.parametrize("backing", ["alone", "shorter"])
def test_tables_dropped_before_the_size_is_durable(monkeypatch: pytest.MonkeyPatch, backing: str) -> None:
    original = Image._shrink

    async def broken(self: Image, size: int) -> None:
        await self.flush()
        geometry = self.geometry
        for index in range(geometry.l1_entries_for(size), geometry.l1_entries_for(self._size)):
            await self._writer.drop_table(index)
        await original(self, size)

    monkeypatch.setattr(Image, "_shrink", broken)
    expect_failure(cut_tables, backing)
