"""Where clusters go so that a file has no gaps: a plan, without I/O, from a map of the file.

The goal: what is in use (data clusters, L2 tables, the L1 table) fills the file from the header up to `Layout.end`,
which is how far it would reach without a gap. So what lies behind that moves to where nothing is, below it. A data
cluster fits anywhere; a table needs as many free clusters in a row as it has.

One plan is one batch of moves. They are independent of each other: every target is free before the batch, none is used
twice, and all sources stay as they are until the whole batch is in effect. So a batch may be cut short (`Moves.cut`).
Then the file is mapped anew, and the next plan made, until there is nothing to do. A plan is the first of these that
applies:

1. Tables lie behind the end, wholly or in part ("stuck"), and below it there are slots. A *slot* is a run of clusters
   as long as a table, without a part of a table in it; those between two tables are counted from the lower one, so
   that filling one leaves the others. Into free slots go stuck tables. Out of the others go data clusters, to the first
   gaps outside of slots, or behind the file's last cluster if there are none: the next plan finds these slots free, as
   it begins with the same ones. What is left of the gaps below the end takes data from behind it.
2. Tables are stuck, and there is no slot: the tables below the end stand too close. So many of the last ones go behind
   the file's last cluster that those and the stuck ones find slots where they were. That needs the most room, and is
   rare: there must be hardly any data.
3. No table is stuck: the last data clusters go to the first gaps. There are as many gaps below the end as there is data
   behind it, so nothing moves twice.

This comes to an end: 3 makes the file shorter each time; each table that 1 moves is stuck no more and takes one slot;
2 makes more slots than tables that are stuck then because of it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice, takewhile

from qedfuse.native._clustermap import Bitmap

#: Tables that plan 2 moves at most; a file that needs more, and hardly holds data, keeps its gaps.
MAX_TABLES = 1 << 20


@dataclass
class Layout:
    """A file without corruptions, in clusters.

    `used`: what the tables refer to, tables included. `tables`: the L1 table and all L2 tables, each of `table_size`
    clusters. `first`: where they may begin, behind the header.
    """

    used: Bitmap
    tables: Bitmap
    first: int
    table_size: int
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.end = self.first + self.used.marked

    @property
    def behind(self) -> int:
        """How many clusters in use lie behind the end."""
        return self.used.marked - self.used.marked_below(self.end)

    def stuck_tables(self) -> Iterator[int]:
        """The first clusters of the tables that do not lie wholly below the end, ascending."""
        start = self.tables.next_marked(self.end)
        if start == self.end:  # maybe not the first cluster of its table: a row of marks is a row of whole tables
            row = self.tables.end_of_free(start)
            start -= (start - row) % self.table_size
        while start < self.tables.clusters:
            stop = self.tables.next_free(start)
            yield from range(start, stop, self.table_size)
            start = self.tables.next_marked(stop)

    def last_tables(self) -> Iterator[int]:
        """The first clusters of the tables that lie below the end, descending."""
        stop = self.tables.end_of_marked(self.end)
        while stop:
            row = self.tables.end_of_free(stop)
            yield from range(stop - (stop - row) % self.table_size - self.table_size, row - 1, -self.table_size)
            stop = self.tables.end_of_marked(row)

    def slots(self) -> Iterator[int]:
        """The first clusters of all slots below the end, ascending."""
        start = self.tables.next_free(self.first)
        while start < self.end:
            stop = min(self.tables.next_marked(start), self.end)
            yield from range(start, stop - self.table_size + 1, self.table_size)
            start = self.tables.next_free(stop)

    def free(self) -> Iterator[int]:
        """All free clusters, ascending, and those behind the file's end."""
        start = self.used.next_free(self.first)
        while start < self.used.clusters:
            stop = self.used.next_marked(start)
            yield from range(start, stop)
            start = self.used.next_free(stop)
        yield from count(self.used.clusters)

    def last_data(self) -> Iterator[tuple[int, int]]:
        """The data clusters behind the end, as runs (first, end), descending."""
        stop = self.used.clusters
        while (stop := self.used.end_of_marked(stop)) > self.end:
            table = self.tables.end_of_marked(stop)
            if table == stop:
                stop = self.tables.end_of_free(stop)
            else:
                first = max(self.end, table, self.used.end_of_free(stop))
                yield first, stop
                stop = first


@dataclass
class Moves:
    """A batch, in clusters. Data goes from `sources` (ascending) to the `targets` at the same places; `tables` has old
    and new first cluster of each table."""

    sources: array[int] = field(default_factory=lambda: array("Q"))
    targets: array[int] = field(default_factory=lambda: array("Q"))
    tables: dict[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.sources or self.tables)

    def end(self, table_size: int) -> int:
        """The cluster behind the last target."""
        tables = (target + table_size for target in self.tables.values())
        return max(max(self.targets, default=-1) + 1, max(tables, default=0))

    def target(self, source: int) -> int:
        """Where a data cluster goes that is among the sources."""
        return self.targets[bisect_left(self.sources, source)]

    def runs(self, most: int) -> Iterator[tuple[int, int, int]]:
        """The data moves as runs of at most `most` clusters: first source, first target, number."""
        start, total = 0, len(self.sources)
        while start < total:
            stop = start + 1
            source, target = self.sources[start], self.targets[start]
            while stop < total and stop - start < most:
                if self.sources[stop] - source != stop - start or self.targets[stop] - target != stop - start:
                    break
                stop += 1
            yield source, target, stop - start
            start = stop

    def cut(self, number: int) -> None:
        """Leave only the first `number` moves of data."""
        del self.sources[number:], self.targets[number:]


def plan(layout: Layout, limit: int) -> Moves:
    """The next batch, of about `limit` clusters (more for plan 2, or for one table); empty if there is nothing to do.

    `layout.used` is good for nothing afterwards: clusters that are promised are marked in it.
    """
    moves = Moves()
    stuck = list(islice(layout.stuck_tables(), max(1, limit // layout.table_size)))
    slots = list(islice(layout.slots(), len(stuck)))
    if stuck and not slots:
        _make_slots(layout, moves, stuck)
        return moves
    evicted = array("Q")
    for slot in slots:
        inside = range(slot, slot + layout.table_size)
        data = [cluster for cluster in inside if layout.used.next_marked(cluster) == cluster]
        evicted.extend(data)
        if not data:
            moves.tables[stuck.pop()] = slot
        layout.used.mark(slot, layout.table_size)
    free = layout.free()
    moves.sources.extend(evicted)
    moves.targets.extend(islice(free, len(evicted)))
    _fill(layout, moves, free, limit - len(evicted))
    return moves


def _make_slots(layout: Layout, moves: Moves, stuck: list[int]) -> None:
    """Plan 2."""
    size = layout.table_size
    going = [table for table in stuck if table < layout.end]
    wanted = len(stuck)
    for table in layout.last_tables():
        going.append(table)
        wanted += 1
        if layout.end - table >= wanted * size:
            break
        if wanted > MAX_TABLES:
            return
    behind = layout.used.end_of_marked()
    moves.tables.update((table, behind + number * size) for number, table in enumerate(going))


def _fill(layout: Layout, moves: Moves, free: Iterator[int], limit: int) -> None:
    """Data from behind the end, the last first, to `free` clusters below it."""
    below = takewhile(lambda cluster: cluster < layout.end, free)
    runs: list[tuple[int, array[int]]] = []
    for first, stop in layout.last_data():
        targets = array("Q", islice(below, min(stop - first, max(0, limit))))
        if not targets:
            break
        runs.append((stop - len(targets), targets))
        limit -= len(targets)
    for source, targets in reversed(runs):
        moves.sources.extend(range(source, source + len(targets)))
        moves.targets.extend(targets)
