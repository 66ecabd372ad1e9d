"""Crash enumeration bites: each test breaks the order of writes in one place, and some state must be judged bad."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from qedfuse.errors import CorruptError
from qedfuse.layers.runs import Kind
from qedfuse.qed import file_growth as growing
from qedfuse.qed.allocator import Allocator
from qedfuse.qed.cluster_writer import ClusterWriter
from qedfuse.qed.commit import Committer
from qedfuse.qed.header import FEATURE_NEED_CHECK
from qedfuse.qed.resize import Resizer
from qedfuse.qed.table_pages import PageMap
from qedfuse.qed.tables import Tables
from qedfuse.qed.tail import CutOff
from qedfuse.sizes import GuestOffset, HostOffset, TableIndex, round_up
from tests.helpers.doubles.crash import SEED
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.images.scenarios import (
    CLUSTER,
    allocate,
    churn,
    cut,
    grow,
    idle,
    lose,
    reuse,
    run_scenario,
    shrink,
    shrink_and_grow,
)
from tests.helpers.images.table_scenarios import (
    TABLE_SCENARIOS,
    cut_and_fill_again,
    cut_tables,
    cut_what_is_mixed,
    run_tables,
)
from tests.helpers.judges.history import Guest
from tests.helpers.judges.survival import BAD, Scenario


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


def begin_change_of(committer: Committer) -> Callable[[], Awaitable[ClusterWriter]]:
    """What `tail.CutOff` wants, from what it is for."""
    alone = SimpleNamespace(backing=None)
    writer = ClusterWriter(committer._storage, committer._tables, committer._allocator, committer, alone)

    async def begin_change() -> ClusterWriter:
        return writer

    return begin_change


@pytest.mark.parametrize("backing", ["shorter", "longer"])
def test_tables_before_the_barrier(monkeypatch: pytest.MonkeyPatch, backing: str) -> None:
    """With a backing file: no sync between the data and the L2 page."""

    async def no_mark(self: Committer) -> None:
        pass

    monkeypatch.setattr(Committer, "_barrier", False)
    monkeypatch.setattr(Committer, "_mark", no_mark)
    expect_failure(allocate, backing)


def test_tables_swapped_with_the_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages go before the barrier instead of behind it."""
    original = Committer._commit

    async def broken(self: Committer, durable: bool) -> None:
        tables = self._tables
        tables.new_tables.update(dict.fromkeys(map(TableIndex, range(tables.geometry.table_entries)), HostOffset(0)))
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


def test_a_discard_that_no_flush_makes_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was discarded, and flushed, is there again."""
    monkeypatch.setattr(Committer, "note_written", lambda self: None)
    expect_failure(reuse, "alone")


@pytest.mark.parametrize("backing", ["alone", "longer"])
def test_discards_that_give_up_their_cluster(monkeypatch: pytest.MonkeyPatch, backing: str) -> None:
    """It is punched, and handed out again while the old entry may still be in the file."""

    async def give_up(self: ClusterWriter, offset: GuestOffset, size: int, image_end: GuestOffset) -> int:
        kind, length, host = (await self._tables.map(offset, size))[0]
        if kind is not Kind.DATA or offset % CLUSTER or length % CLUSTER:
            return await original(self, offset, size, image_end)
        await self._set_entries(offset, CLUSTER, self._zero_entry)
        await self._storage.punch(host, CLUSTER)
        self._allocator.put_free([(host, CLUSTER)])
        return CLUSTER

    original = ClusterWriter.zero
    monkeypatch.setattr(ClusterWriter, "zero", give_up)
    expect_failure(churn, backing)


def test_lost_clusters_come_back_before_the_punch_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a backing file: what was not written shows beside what was."""

    async def punch_now(guest: Guest) -> None:
        def lose_and_find(self: Allocator, offset: HostOffset, size: int) -> None:
            guest.image.storage.apply_punch(offset, size)  # type: ignore[attr-defined]
            self.put_free([(offset, size)])

        monkeypatch.setattr(Allocator, "lose", lose_and_find)
        guest.may_fail = True
        await lose(guest)

    expect_failure(punch_now, "alone")


def test_lost_clusters_come_back_unpunched(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_punch(self: Committer, lost: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return lost

    monkeypatch.setattr(Committer, "_punch", no_punch)
    expect_failure(lose, "alone")


@pytest.mark.parametrize("scenario", [allocate, lose], ids=lambda scenario: scenario.__name__)
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
    """What is cut off is zeroed before the smaller size is durable."""
    original = Committer.shrink

    async def broken(self: Committer, size: GuestOffset) -> None:
        await self.flush()
        header = self.header.with_image_size(size)
        await CutOff(self._storage, header, self._tables, begin_change_of(self)).punch()
        await original(self, size)

    monkeypatch.setattr(Committer, "shrink", broken)
    expect_failure(shrink, backing)


def test_grow_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger size is written before the entries that hide the backing file."""
    original = Resizer.grow

    async def broken(self: Resizer, size: GuestOffset) -> None:
        committer = self._committer
        await committer._write_header(committer.header.with_image_size(size))
        await original(self, size)

    monkeypatch.setattr(Resizer, "grow", broken)
    expect_failure(grow, "longer")


def test_grow_without_hiding_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: ClusterWriter, image_end: int, *, growing: bool) -> None:
        pass

    monkeypatch.setattr(ClusterWriter, "clear_tail", nothing)
    expect_failure(shrink_and_grow, "alone")


def test_shrink_to_whole_sectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut off inside of a sector stays."""
    original = Resizer.shrink

    async def rounded(self: Resizer, end: GuestOffset) -> None:
        await original(self, round_up(end, 512))

    monkeypatch.setattr(Resizer, "shrink", rounded)
    expect_failure(cut, "alone")


def test_shrink_before_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut off is zeroed while the image may still have it after a crash."""
    original = Resizer.shrink

    async def early(self: Resizer, end: GuestOffset) -> None:
        await (await self._begin_change()).clear_tail(round_up(end, 512), growing=False)
        await original(self, end)

    monkeypatch.setattr(Resizer, "shrink", early)
    expect_failure(shrink, "alone")


# -- the tail of the file -------------------------------------------------------------------------------------------


def test_the_tail_is_cut_before_its_entries_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a backing file the image is marked, and the repair drops what points outside."""

    async def broken(self: Committer, end: HostOffset) -> None:
        await self.growth.give_up(end)
        await self.flush()

    monkeypatch.setattr(Committer, "give_up_tail", broken)
    expect_failure(cut_tables, "shorter")


def test_the_tail_is_used_before_the_cut_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a table show beside what was written."""

    async def broken(self: Committer, end: HostOffset) -> None:
        await self.flush()
        await self.growth.give_up(end)

    monkeypatch.setattr(Committer, "give_up_tail", broken)
    expect_failure(cut_tables, "alone")


def test_the_tail_is_used_again_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is not cut at all."""

    async def broken(self: Committer, end: HostOffset) -> None:
        await self.flush()
        self._allocator.cut(end)

    monkeypatch.setattr(Committer, "give_up_tail", broken)
    expect_failure(cut_tables, "alone")


@pytest.mark.parametrize("backing", ["alone", "shorter"])
def test_a_tail_with_what_stays_in_it(monkeypatch: pytest.MonkeyPatch, backing: str) -> None:
    """Its first cluster is in use."""
    original = CutOff.find_tail

    async def broken(self: CutOff) -> int:
        return await original(self) - CLUSTER

    monkeypatch.setattr(CutOff, "find_tail", broken)
    expect_failure(cut_what_is_mixed, backing)


@pytest.mark.parametrize(("scenario", "backing"), [(cut_and_fill_again, "shorter"), (cut_tables, "alone")])
def test_dropped_tables_stay_in_memory(monkeypatch: pytest.MonkeyPatch, scenario: Scenario, backing: str) -> None:
    """Changes go to pages whose place in the file is somebody else's."""

    def broken(self: Tables, l1_index: TableIndex) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(PageMap, "drop", lambda *_: None)
            original(self, l1_index)

    original = Tables.drop_table
    monkeypatch.setattr(Tables, "drop_table", broken)
    expect_failure(scenario, backing)


@pytest.mark.parametrize("backing", ["alone", "shorter"])
def test_tables_dropped_before_the_size_is_durable(monkeypatch: pytest.MonkeyPatch, backing: str) -> None:
    original = Committer.shrink

    async def broken(self: Committer, size: GuestOffset) -> None:
        await self.flush()
        cut_off = CutOff(self._storage, self.header.with_image_size(size), self._tables, begin_change_of(self))
        tail = await cut_off.find_tail()
        await cut_off.forget(tail)
        await original(self, size)
        await self.give_up_tail(tail)

    monkeypatch.setattr(Committer, "shrink", broken)
    expect_failure(cut_tables, backing)
