"""Filling the gaps of a file that has leaks, crashed anywhere: the image is no worse, and a second repair finishes.

`test_repair_crash.py` has these images among others; here the moves go in small batches, so that each uses what the one
before has freed, and the rules are broken on purpose.
"""

from __future__ import annotations

import random

import pytest
import trio

from qedfuse.check import gap_filling as release
from qedfuse.check.check import Repair
from qedfuse.check.compaction import Moves
from qedfuse.check.gap_filling import _Filling
from qedfuse.check.repair import repair_tables
from qedfuse.progress import Report
from qedfuse.qed.cluster_map import ClusterMap
from qedfuse.qed.header import Header
from tests.helpers.doubles.image_ram import Ram
from tests.helpers.images.check_faults import CUT_SHORT, LEAKS, broken, cut_short, leaks_in_the_middle
from tests.helpers.images.check_faults import Fault as Damage
from tests.helpers.images.check_images import contents, count
from tests.helpers.judges.check_tools import check_ram, expect_no_worse, shared_with_tables


def enumerate_crashes(damage: Damage, samples: int, repair: Repair = Repair.LEAKS) -> int:
    raw = broken(damage)
    storage = Ram(raw)
    check_ram(storage, repair)
    before, shared, tried = contents(raw), shared_with_tables(raw), set()
    assert not shared
    left = count(storage.raw)
    assert left.unreferenced == left.corruptions == 0
    for state in storage.crashes(random.Random(1), samples):
        if state not in tried:
            tried.add(state)
            assert count(state).corruptions == 0, "corrupt after a crash"
            expect_no_worse(state, before, shared)
    assert len(tried) > 1, "the repair has written nothing"
    return len(tried)


@pytest.mark.parametrize("limit", [1, 5, 1 << 18])
@pytest.mark.parametrize("damage", LEAKS)
def test_a_crash_while_clusters_move(damage: Damage, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "BATCH_CLUSTERS", limit)
    states = enumerate_crashes(damage, 2 if limit == 1 else 5)
    print(f"{damage.__name__}, batches of {limit}: {states} states")


@pytest.mark.parametrize("limit", [5, 1 << 18])
@pytest.mark.parametrize("damage", [*LEAKS, *CUT_SHORT])
def test_a_crash_while_an_image_is_compacted(damage: Damage, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, and before that the entries past the image's end become 0."""
    monkeypatch.setattr(release, "BATCH_CLUSTERS", limit)
    states = enumerate_crashes(damage, 5, Repair.COMPACT)
    print(f"{damage.__name__}, batches of {limit}: {states} states")


def without_sync(which: int) -> type[_Filling]:
    """Of the syncs of a batch, that after the copies (0), or that after the entries (1), is not done."""

    class Careless(_Filling):
        async def _copy(self, moves: Moves) -> None:
            await super()._copy(moves)
            if which == 0:
                self._skip_one()

        async def relink(self, moves: Moves) -> tuple[ClusterMap, ClusterMap]:
            maps = await super().relink(moves)
            if which == 1:
                self._skip_one()
            return maps

        def _skip_one(self) -> None:
            storage, sync = self._storage, self._storage.sync

            async def skipped() -> None:
                storage.sync = sync  # type: ignore[method-assign]
                await trio.lowlevel.checkpoint()

            storage.sync = skipped  # type: ignore[method-assign]

    return Careless


class EntriesFirst(_Filling):
    """The entries are changed, durably, before the copies are made."""

    async def _copy(self, moves: Moves) -> None:
        await trio.lowlevel.checkpoint()

    async def relink(self, moves: Moves) -> tuple[ClusterMap, ClusterMap]:
        maps = await super().relink(moves)
        await self._storage.sync()
        await super()._copy(moves)
        return maps


class ReusesAtOnce(_Filling):
    """The old places are written over as soon as they have been copied."""

    async def _copy(self, moves: Moves) -> None:
        await super()._copy(moves)
        await self.punch_sources(moves)


def test_entries_that_are_dropped_are_durable_before_their_clusters_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 4's sync, and the one with which step 6 begins."""

    async def hasty(storage: Ram, header: Header, used: ClusterMap, progress: Report | None = None) -> Header:
        return await _Filling(storage, header, progress).run(used)

    async def drop(storage: Ram, header: Header, *, overlaps: bool, progress: Report | None = None) -> None:
        sync = storage.sync
        storage.sync = trio.lowlevel.checkpoint  # type: ignore[method-assign]
        await repair_tables(storage, header, overlaps=overlaps, progress=progress)
        storage.sync = sync  # type: ignore[method-assign]

    monkeypatch.setattr("qedfuse.check.check.fill_gaps", hasty)
    monkeypatch.setattr("qedfuse.check.check.repair_tables", drop)
    with pytest.raises(AssertionError, match="corrupt after a crash"):
        enumerate_crashes(cut_short, 10, Repair.COMPACT)


@pytest.mark.parametrize(
    "mutant",
    [without_sync(0), without_sync(1), EntriesFirst, ReusesAtOnce],
    ids=["copies not synced", "entries not synced", "entries first", "reused at once"],
)
def test_the_crash_test_bites(mutant: type[_Filling], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "BATCH_CLUSTERS", 5)
    monkeypatch.setattr(release, "_Filling", mutant)
    with pytest.raises(AssertionError, match=r"has changed|corrupt after a crash"):
        enumerate_crashes(leaks_in_the_middle, 10)


def test_without_the_first_sync_a_killed_daemons_work_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry of 0 that is only in the page cache: the cluster is not free yet. See also test_repair_crash.py."""

    async def fill_at_once(storage: Ram, header: object, used: ClusterMap, progress: object = None) -> object:
        return await _Filling(storage, header, None).run(used)  # type: ignore[arg-type]

    for hasty in (False, True):
        raw = broken(leaks_in_the_middle)
        storage = Ram(raw)
        # the entry of the first data cluster, which the first move fills
        table = 3 * 4096
        entry = int.from_bytes(raw[table : table + 8], "little")
        assert entry > 4096
        trio.run(storage.write, table, [bytes(8)])
        with monkeypatch.context() as patch:
            if hasty:
                patch.setattr("qedfuse.check.check.fill_gaps", fill_at_once)
            check_ram(storage, Repair.LEAKS)
        old, new = contents(raw), contents(storage.raw)
        states = list(storage.crashes(random.Random(4), 20))
        wrong = sum(contents(state).get(0) not in (old[0], new.get(0)) for state in states)
        assert bool(wrong) == hasty
