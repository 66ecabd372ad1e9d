"""Moving clusters and tables within the file of an image: batches of moves, each safe against a crash at any moment.

A batch (`compaction.Moves`) is copied (`copy_run`) and synced, then put in effect (`relink`) and synced: steps 6a and
6b of the rulebook in `repair.py`, which says what a crash leaves. All targets must be free, and inside the file. The
old places are free only afterwards.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import compress

from qedfuse.check.compaction import Moves
from qedfuse.errors import CorruptError
from qedfuse.host.chunks import TableChunks, entry_at, pack_entry, unpack_entries, write_changes
from qedfuse.host.storage import Storage, fill
from qedfuse.host.waiting import Breather
from qedfuse.qed.cluster_map import ClusterMap
from qedfuse.qed.header import Header
from qedfuse.qed.header_io import write_header
from qedfuse.qed.table_walk import Bounds

#: Bytes that are copied at once.
PIECE = 1 << 20


class Relocation:
    """An image whose clusters are moved. `header`: as it is in the file; a moved L1 table changes it. Nothing else uses
    the file. All calls raise OSError; cancelled or failed, they have done a part, and the image reads as before."""

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self.header = header
        self._size = header.cluster_size
        self._bits = header.geometry.cluster_bits
        self._breathe = Breather()

    async def copy_run(self, source: int, target: int, number: int) -> int:
        """Copy a run of clusters to free ones (numbers of clusters); what is a hole of the host there is one here.
        Returns how many bytes were copied."""
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
            position = min(storage.next_hole(data), data + PIECE, end)
            piece = bytearray(position - data)
            with memoryview(piece) as view:
                await fill(storage, data, view)
            await storage.write(data + shift, [piece])
            copied += len(piece)
            await self._breathe()
            if position >= end:
                break
        return copied

    async def relink(self, moves: Moves) -> tuple[ClusterMap, ClusterMap]:
        """Step 6b: the tables refer to what has been copied. Returns the new map of what is used, and that of the
        tables."""
        storage, table_size, geometry = self._storage, self.header.table_size, self.header.geometry
        old_l1 = self.header.l1_table_offset >> self._bits
        l1 = moves.tables.get(old_l1, old_l1)
        bounds = Bounds.of(self.header, storage.size())
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
            self.header = replace(self.header, l1_table_offset=l1 << self._bits)
            await write_header(storage, self.header)
        return used, tables

    async def _relink_l2(self, offset: int, moves: Moves, moving: ClusterMap, used: ClusterMap) -> int:
        """The L2 table at `offset`. Returns how many of its entries have changed."""
        hits = 0
        size = self.header.geometry.table_bytes
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

    async def punch_sources(self, moves: Moves) -> None:
        """Give back what has moved, when that is in effect, durably."""
        for source, _target, number in moves.runs(len(moves.sources)):
            await self._storage.punch(source * self._size, number * self._size)
        for source in moves.tables:
            await self._storage.punch(source * self._size, self.header.geometry.table_bytes)
