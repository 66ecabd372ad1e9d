"""Step 6 of a repair: what nothing refers to goes back to the host. The rulebook is in `repair.py`.

At the end of the file it is cut off. In the middle it is filled with what is last in the file (`compaction.py` says
what goes where; here it is done), or only punched, which costs next to nothing but leaves leaked clusters.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress

from qedfuse.check.compaction import Layout, Moves, plan
from qedfuse.check.relocation import PIECE, Relocation
from qedfuse.host.storage import Storage
from qedfuse.host.waiting import Breather
from qedfuse.progress import Report
from qedfuse.qed.cluster_map import ClusterMap
from qedfuse.qed.header import Header
from qedfuse.qed.table_walk import Bounds, L1Entries

#: Clusters of one batch: how much is planned at once, 16 bytes each.
BATCH_CLUSTERS = 1 << 18
#: Bytes after whose copying a batch is put in effect: what a crash undoes, and a full disk must have room for.
BATCH_BYTES = 1 << 30


async def punch(storage: Storage, header: Header, used: ClusterMap) -> None:
    """Step 6 after a crash. `used` is of tables that are in order.

    Raises OSError. Cancelled or failed, it has done a part.
    """
    await storage.sync()
    if storage.fixed:
        return
    size = header.cluster_size
    end = used.end_of_marked()
    breathe = Breather()
    for first, stop in _runs_with_data(storage, header, used):
        await breathe()
        if first < min(stop, end):
            await storage.punch(first * size, (min(stop, end) - first) * size)
    await _cut(storage, end * size)
    await storage.sync()


def _runs_with_data(storage: Storage, header: Header, used: ClusterMap) -> Iterator[tuple[int, int]]:
    """The clusters that nothing refers to and that hold data, as runs (first, end). Some runs are empty (no news)."""
    size = header.cluster_size
    first = used.next_free(header.header_size)
    while first < used.clusters and (data := storage.next_data(first * size)) is not None:
        first = stop = used.next_free(data // size)
        if first == data // size:
            stop = min(used.next_marked(first), -(-storage.next_hole(data) // size))
        yield first, stop
        first = used.next_free(stop)


async def _cut(storage: Storage, end: int) -> None:
    if storage.size() > end:
        await storage.truncate(end)


async def fill_gaps(storage: Storage, header: Header, used: ClusterMap, progress: Report | None = None) -> Header:
    """Step 6: the file gets as short as what is in use. Returns the header, which a moved L1 table changes.

    `used` is of tables that are in order, and good for nothing afterwards. `progress(done, total)` counts clusters.
    Memory: three bits for each cluster of the file, and a few MiB. Raises OSError, ENOSPC if not even a part of the
    work can be done; cancelled or failed, it has done a part, and the image reads as before.
    """
    await storage.sync()
    return header if storage.fixed else await _Filling(storage, header, progress).run(used)


class _Filling(Relocation):
    """`_moved`, `_total`: clusters, for the progress. `_full`: the host has no room for a whole batch."""

    def __init__(self, storage: Storage, header: Header, progress: Report | None) -> None:
        super().__init__(storage, header)
        self._progress = progress
        self._moved = self._total = 0
        self._full = False

    async def run(self, used: ClusterMap) -> Header:
        table_size = self.header.table_size
        tables = ClusterMap(self._storage, Bounds.of(self.header, self._storage.size()))
        tables.mark(self.header.l1_table_offset >> self._bits, table_size)
        async for _, offset in L1Entries(self._storage, self.header, self._breathe):
            tables.mark(offset >> self._bits, table_size)
        while True:
            await _cut(self._storage, used.end_of_marked() * self._size)
            layout = Layout(used, tables, self.header.header_size, table_size)
            self._total = self._total or layout.behind
            moves = plan(layout, BATCH_CLUSTERS)
            if not moves:
                break
            del used, tables, layout
            await self._copy(moves)
            await self._storage.sync()
            used, tables = await self.relink(moves)
            await self._storage.sync()
            if self._full:
                await self.punch_sources(moves)
        await self._storage.sync()
        return self.header

    async def _copy(self, moves: Moves) -> None:
        """Step 6a. Leaves in `moves` what has been copied, if that is enough for now, or there is not room for more.

        Not if only tables were to go behind the file's end: such a plan leads nowhere unless it is carried out whole.
        """
        before, table_size = self._storage.size(), self.header.table_size
        grown = moves.end(table_size) * self._size
        whole = grown > before and not moves.sources
        most = 1 if self._full else max(1, PIECE // self._size)
        copied = done = 0
        tables, moves.tables = moves.tables, {}
        try:
            if grown > before:
                await self._storage.truncate(grown)
            for source, target, number in moves.runs(most):
                if copied >= BATCH_BYTES:
                    break
                copied += await self.copy_run(source, target, number)
                done += number
                self._tell(number)
            for source, target in tables.items():
                await self.copy_run(source, target, table_size)
                moves.tables[source] = target
                self._tell(table_size)
        except OSError as error:
            lacking = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if lacking and not whole and (done or moves.tables or not self._full):
                moves.cut(done)
                self._full = True
                return
            if grown > before:
                with suppress(OSError):
                    await self._storage.truncate(before)
            raise
        moves.cut(done)

    def _tell(self, moved: int) -> None:
        self._moved += moved
        if self._progress is not None:
            self._progress(min(self._moved, self._total), self._total)
