"""Step 6 of a repair: what nothing refers to goes back to the host. The rulebook is in `repair.py`.

At the end of the file it is cut off. In the middle it is filled with what is last in the file (`compaction.py` says
what goes where; here it is done), or only punched, which costs next to nothing but leaves leaked clusters.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import compress

from qedfuse.check.compaction import Layout, Moves, plan
from qedfuse.errors import CorruptError
from qedfuse.host.chunks import TableChunks, entry_at, pack_entry, unpack_entries, write_changes
from qedfuse.host.storage import Storage, fill
from qedfuse.host.waiting import Breather
from qedfuse.progress import Report
from qedfuse.qed.cluster_map import ClusterMap
from qedfuse.qed.header import Header
from qedfuse.qed.header_io import write_header
from qedfuse.qed.table_walk import Bounds, L1Entries

#: Clusters of one batch: how much is planned at once, 16 bytes each.
BATCH_CLUSTERS = 1 << 18
#: Bytes after whose copying a batch is put in effect: what a crash undoes, and a full disk must have room for.
BATCH_BYTES = 1 << 30

#: Bytes that are copied at once.
_PIECE = 1 << 20


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


class _Filling:
    """`_moved`, `_total`: clusters, for the progress. `_full`: the host has no room for a whole batch."""

    def __init__(self, storage: Storage, header: Header, progress: Report | None) -> None:
        self._storage = storage
        self._header = header
        self._size = header.cluster_size
        self._bits = header.geometry.cluster_bits
        self._progress = progress
        self._breathe = Breather()
        self._moved = self._total = 0
        self._full = False

    async def run(self, used: ClusterMap) -> Header:
        table_size = self._header.table_size
        tables = ClusterMap(self._storage, Bounds.of(self._header, self._storage.size()))
        tables.mark(self._header.l1_table_offset >> self._bits, table_size)
        async for _, offset in L1Entries(self._storage, self._header, self._breathe):
            tables.mark(offset >> self._bits, table_size)
        while True:
            await _cut(self._storage, used.end_of_marked() * self._size)
            layout = Layout(used, tables, self._header.header_size, table_size)
            self._total = self._total or layout.behind
            moves = plan(layout, BATCH_CLUSTERS)
            if not moves:
                break
            del used, tables, layout
            await self._copy(moves)
            await self._storage.sync()
            used, tables = await self._relink(moves)
            await self._storage.sync()
            if self._full:
                await self._punch_sources(moves)
        await self._storage.sync()
        return self._header

    async def _copy(self, moves: Moves) -> None:
        """Step 6a. Leaves in `moves` what has been copied, if that is enough for now, or there is not room for more.

        Not if only tables were to go behind the file's end: such a plan leads nowhere unless it is carried out whole.
        """
        before, table_size = self._storage.size(), self._header.table_size
        grown = moves.end(table_size) * self._size
        whole = grown > before and not moves.sources
        most = 1 if self._full else max(1, _PIECE // self._size)
        copied = done = 0
        tables, moves.tables = moves.tables, {}
        try:
            if grown > before:
                await self._storage.truncate(grown)
            for source, target, number in moves.runs(most):
                if copied >= BATCH_BYTES:
                    break
                copied += await self._copy_run(source, target, number)
                done += number
                self._tell(number)
            for source, target in tables.items():
                await self._copy_run(source, target, table_size)
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

    async def _punch_sources(self, moves: Moves) -> None:
        for source, _target, number in moves.runs(len(moves.sources)):
            await self._storage.punch(source * self._size, number * self._size)
        for source in moves.tables:
            await self._storage.punch(source * self._size, self._header.geometry.table_bytes)

    def _tell(self, moved: int) -> None:
        self._moved += moved
        if self._progress is not None:
            self._progress(min(self._moved, self._total), self._total)

    async def _copy_run(self, source: int, target: int, number: int) -> int:
        """Copy a run of clusters; what is a hole of the host there is one here. Returns how many bytes were copied."""
        await self._breathe()
        try:
            return await self._copy_data(source, target, number)
        except OSError:
            with suppress(OSError):  # it takes room, and nothing will refer to it
                await self._storage.punch(target * self._size, number * self._size)
            raise

    async def _copy_data(self, source: int, target: int, number: int) -> int:
        storage = self._storage
        position, shift, length = source * self._size, (target - source) * self._size, number * self._size
        end, copied = position + length, 0
        if storage.next_data(position) != position or storage.next_hole(position) < end:
            stale = storage.next_data(position + shift)
            if stale is not None and stale < end + shift:
                await storage.punch(position + shift, length)
        while (data := storage.next_data(position)) is not None and data < end:
            position = min(storage.next_hole(data), data + _PIECE, end)
            piece = bytearray(position - data)
            with memoryview(piece) as view:
                await fill(storage, data, view)
            await storage.write(data + shift, [piece])
            copied += len(piece)
            await self._breathe()
            if position >= end:
                break
        return copied

    async def _relink(self, moves: Moves) -> tuple[ClusterMap, ClusterMap]:
        """Step 6b. Returns the new map of what is used, and that of the tables."""
        storage, table_size, geometry = self._storage, self._header.table_size, self._header.geometry
        old_l1 = self._header.l1_table_offset >> self._bits
        l1 = moves.tables.get(old_l1, old_l1)
        bounds = Bounds.of(self._header, storage.size())
        used, tables, moving = (ClusterMap(storage, bounds) for _ in range(3))
        for source, _target, number in moves.runs(len(moves.sources)):
            moving.mark(source, number)
        used.mark(l1, table_size)
        tables.mark(l1, table_size)
        hits = int(l1 != old_l1)
        async for position, chunk in TableChunks(storage, l1 << self._bits, geometry.table_bytes, self._breathe):
            before = bytes(chunk)
            entries = unpack_entries(before)
            for number, value in compress(enumerate(entries), entries):
                await self._breathe()
                table = value >> self._bits
                if (new := moves.tables.get(table, table)) != table:
                    pack_entry(chunk, number, new << self._bits)
                    hits += 1
                if not bounds.holds(new << self._bits, geometry.table_bytes) or used.mark(new, table_size):
                    raise self._changed()
                tables.mark(new, table_size)
                hits += await self._relink_l2(new << self._bits, moves, moving, used)
            await write_changes(storage, (l1 << self._bits) + position, before, chunk)
        if hits != len(moves.sources) + len(moves.tables):
            raise self._changed()
        if l1 != old_l1:
            self._header = replace(self._header, l1_table_offset=l1 << self._bits)
            await write_header(storage, self._header)
        return used, tables

    async def _relink_l2(self, offset: int, moves: Moves, moving: ClusterMap, used: ClusterMap) -> int:
        """The L2 table at `offset`. Returns how many of its entries have changed."""
        hits = 0
        size = self._header.geometry.table_bytes
        async for position, chunk in TableChunks(self._storage, offset, size, self._breathe):
            if found := moving.find_entries(chunk):
                hits += len(found)
                before = bytes(chunk)
                for number in found:
                    source = entry_at(before, number) >> self._bits
                    pack_entry(chunk, number, moves.target(source) << self._bits)
                await write_changes(self._storage, offset + position, before, chunk)
            marks = used.mark_entries(chunk)
            if marks.invalid or marks.again:
                raise self._changed()
        return hits

    def _changed(self) -> CorruptError:
        return CorruptError(self._storage.path, "was changed by another program while it was repaired; check it again")
