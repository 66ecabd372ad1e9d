"""What is left behind the end of an image that was cut short: no tail of the file, and holes.

Called with the whole image locked and after all of it was flushed: what the file says of its tables is true, and no
page of them is about to be written. The rules that make this safe are in `commit.py`.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import NamedTuple

from qedfuse.errors import CorruptError
from qedfuse.host.chunks import TableChunks, unpack_entries
from qedfuse.host.storage import Storage
from qedfuse.host.waiting import Breather
from qedfuse.qed.cluster_map import read_used
from qedfuse.qed.cluster_writer import ClusterWriter
from qedfuse.qed.header import Header
from qedfuse.qed.table_walk import Bounds, L1Entries
from qedfuse.qed.tables import Tables
from qedfuse.sizes import ENTRY_SIZE, GuestOffset, HostOffset, TableIndex


class Part(NamedTuple):
    """Entries behind the end, as they are in the file: those of a part of an L2 table. `whole`: all of the table is
    behind the end. `guest`: what the first entry maps."""

    l1_index: TableIndex
    table: HostOffset
    whole: bool
    guest: GuestOffset
    entries: array[int]


class CutOff:
    """Of an image whose `header` has the new size. Offsets and sizes are bytes. Everything raises OSError.

    `begin_change` comes before each change: there may be too many dirty pages.
    """

    def __init__(
        self, storage: Storage, header: Header, tables: Tables, begin_change: Callable[[], Awaitable[ClusterWriter]]
    ) -> None:
        self._storage = storage
        self._header = header
        self._tables = tables
        self._begin_change = begin_change
        self._bounds = Bounds.of(header, tables.ends.end)
        self._cluster_size = header.cluster_size
        self._breathe = Breather()

    async def punch(self) -> None:
        """Make holes of all clusters that are cut off. Those that the host cannot punch lose their entries. Last: what
        the file says of its tables may not be true any more."""
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                runs = list(self._tables.data_runs(part.entries))
                clusters = await self._begin_change()
                if runs and not await clusters.punch(runs):
                    await clusters.unmap(part.guest, len(part.entries) * self._cluster_size)

    async def find_tail(self) -> HostOffset:
        """From where on the file holds nothing to which the inside of the image refers, and no table that refers to
        what lies before. The end of the file if that cannot be told: in bounded memory, or of tables that overlap."""
        try:
            used = await read_used(self._storage, self._bounds, self._breathe, inside=True)
        except CorruptError:
            return HostOffset(self._bounds.end)
        tail = HostOffset(used.end_of_marked() * self._cluster_size)
        if tail < self._bounds.end:
            size = self._header.geometry.table_bytes
            for table, lowest in sorted((await self._lowest()).items()):
                if (table < tail and table + size > tail) or lowest < tail <= table:
                    tail = table + size
        return tail

    async def _lowest(self) -> dict[HostOffset, int]:
        """For each table that is cut off whole, the lowest cluster to which it refers; the file's end: to none."""
        lowest: dict[HostOffset, int] = {}
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                if not part.whole:
                    continue
                first = min(part.entries, default=self._bounds.end)
                if part.entries and not self._bounds.holds(first, self._cluster_size):  # 0, 1, or nonsense
                    starts = (start for start, _size in self._tables.data_runs(part.entries))
                    first = min(starts, default=self._bounds.end)
                lowest[part.table] = min(first, lowest.get(part.table, first))
        return lowest

    async def forget(self, tail: HostOffset) -> None:
        """Take away the tables behind `tail`, and the entries that refer to what is there."""
        dropped = -1
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                clusters = await self._begin_change()
                if part.whole and part.table >= tail:
                    if part.l1_index != dropped:
                        await clusters.drop_table(part.l1_index)
                    dropped = part.l1_index
                    continue
                for first, end in _runs_behind(part.entries, tail):
                    await self._breathe()
                    await clusters.unmap(part.guest + first * self._cluster_size, (end - first) * self._cluster_size)

    async def _parts(self) -> AsyncGenerator[Part, None]:
        """Of each table first one that is empty. A table to which several entries lead comes once."""
        geometry = self._header.geometry
        seen: set[int] = set()
        async for number, entry in L1Entries(self._storage, self._header, self._breathe):
            index, table = TableIndex(number), HostOffset(entry)
            inside = self._bounds.entries_inside(index)
            if inside == geometry.table_entries or table in seen or not self._bounds.holds(table, geometry.table_bytes):
                continue
            seen.add(table)
            first = index * geometry.table_entries
            yield Part(index, table, not inside, GuestOffset(first * self._cluster_size), array("Q"))
            async for start, chunk in TableChunks(self._storage, table, geometry.table_bytes, self._breathe):
                position = max(start, inside * ENTRY_SIZE)
                if entries := unpack_entries(chunk[position - start :]):
                    guest = GuestOffset((first + position // ENTRY_SIZE) * self._cluster_size)
                    yield Part(index, table, not inside, guest, entries)


def _runs_behind(entries: array[int], tail: HostOffset) -> Iterator[tuple[int, int]]:
    """Where entries refer to what is behind `tail`: first and end of each run."""
    if not entries or max(entries) < tail:
        return
    if min(entries) >= tail:
        yield 0, len(entries)
        return
    first = -1
    for position, entry in enumerate(entries):
        if (entry >= tail) != (first >= 0):
            if first >= 0:
                yield first, position
            first = position if first < 0 else -1
    if first >= 0:
        yield first, len(entries)
