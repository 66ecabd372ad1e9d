"""A qcow2 image, read-only, as a layer of a backing chain.

Opening reads the header and nothing else. L1 and L2 tables are read in pages of 4 KiB on demand and kept in a bounded
cache; compressed clusters are unpacked one at a time, and the last few are kept, since readers come in small pieces.

Every byte of the file may be hostile: whatever it holds, the outcome is data from inside the file or a CorruptError.
One deviation from QEMU: a data cluster or table that lies past the end of the file, which QEMU reads as zeroes and
which `qemu-img check` calls a corruption, is an error: a file that was copied in part must not pass for a whole one.

Source: QEMU docs/interop/qcow2, "Cluster mapping".
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

import trio

from qedfuse.errors import CorruptError
from qedfuse.host.storage import ReadStorage, read
from qedfuse.layers.extents import HostExtents
from qedfuse.layers.layer import Layer
from qedfuse.layers.qcow2.entries import (
    ENTRY_COMPRESSED,
    ENTRY_OFFSET,
    EntryMapper,
)
from qedfuse.layers.qcow2.header import Qcow2Header, decode_cluster_bits
from qedfuse.layers.qcow2.unpack import unpack
from qedfuse.layers.runs import Kind, Run, append_run
from qedfuse.sizes import ENTRY_SIZE, PAGE_ENTRIES, PAGE_SIZE

#: Table pages kept per layer, in bytes; what Python adds to a page counts too.
TABLE_CACHE_BYTES = 2 << 20
_PAGE_OVERHEAD = 384
#: Unpacked clusters kept per layer, in bytes; at least one cluster.
CLUSTER_CACHE_BYTES = 2 << 20
#: Compressed clusters unpacked at a time; bounds the memory in flight.
_UNPACKERS = 4
#: L2 entries that one call of `map` looks at, at most: a few milliseconds.
_WALK_ENTRIES = 16384

Key = TypeVar("Key")
Value = TypeVar("Value")


class _Lru(Generic[Key, Value]):
    """At most `limit` values; the one unused for longest goes first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        value = self._items.get(key)
        if value is not None:
            self._items.move_to_end(key)
        return value

    def put(self, key: Key, value: Value) -> None:
        self._items[key] = value
        self._items.move_to_end(key)
        if len(self._items) > self._limit:
            self._items.popitem(last=False)


class _Page(NamedTuple):
    """Part of an L1 or L2 table; host offset and size in bytes."""

    host: int
    size: int


class _PageMissing(Exception):
    """A page must be loaded first."""

    def __init__(self, page: _Page) -> None:
        super().__init__(page)
        self.page = page


async def read_qcow2_header(storage: ReadStorage) -> Qcow2Header:
    """The header of a qcow2 image, validated against the file; reads its first cluster at most.

    Raises FormatError, UnsupportedError, CorruptError (see `Qcow2Header.decode`), OSError of the host.
    """
    file_size = storage.size()
    head = await read(storage, 0, min(file_size, PAGE_SIZE))
    cluster_size = 1 << decode_cluster_bits(head, storage.path)
    if len(head) < min(file_size, cluster_size):
        head = await read(storage, 0, min(file_size, cluster_size))
    header = Qcow2Header.decode(head, storage.path)
    header.validate_file_size(file_size, storage.path)
    return header


class Qcow2Layer:
    """A qcow2 image. See `layers.layer.Layer`. `storage` and `backing` are owned and closed with the layer.

    `header` is what `read_qcow2_header` returned for this storage. `backing` is the layer that `header.backing_name`
    names; None: what is unallocated reads as zeroes.
    """

    format = "qcow2"
    version = 0

    def __init__(self, storage: ReadStorage, header: Qcow2Header, backing: Layer | None) -> None:
        self.path = storage.path
        self.storage = storage
        self.header = header
        self._backing = backing
        self._end_of_file = storage.size()
        self._mapper = EntryMapper(header, self.path)
        self._tables: _Lru[_Page, array[int]] = _Lru(TABLE_CACHE_BYTES // (header.page_bytes + _PAGE_OVERHEAD))
        self._clusters: _Lru[int, bytes] = _Lru(max(1, CLUSTER_CACHE_BYTES // header.cluster_size))
        self._unpackers = [trio.Lock() for _ in range(_UNPACKERS)]

    @classmethod
    async def open(cls, storage: ReadStorage, backing: Layer | None) -> Qcow2Layer:
        """Read the header and make the layer, for a caller that has the backing layer. Errors: `read_qcow2_header`."""
        return cls(storage, await read_qcow2_header(storage), backing)

    @property
    def size(self) -> int:
        return self.header.size

    @property
    def backing(self) -> Layer | None:
        return self._backing

    def map_nowait(self, offset: int, size: int) -> list[Run] | None:
        """See `Layer`. None also where the range takes more entries than one call may look at. Raises CorruptError."""
        try:
            runs, end = self._walk(offset, offset + size)
        except _PageMissing:
            return None
        return runs if end == offset + size else None

    async def map(self, offset: int, size: int, extents: HostExtents | None = None) -> list[Run]:
        """See `Layer`. Raises CorruptError, OSError of the host."""
        while True:
            try:
                return self._walk(offset, offset + size)[0]
            except _PageMissing as missing:
                await self._load(missing.page)

    async def read_indirect(self, offset: int, size: int) -> bytes:
        """See `Layer`. Raises CorruptError (a broken stream), OSError of the host."""
        cluster_size = self.header.cluster_size
        parts = []
        end = offset + size
        while offset < end:
            start = offset & -cluster_size
            stop = min(end, start + cluster_size)
            parts.append((await self._unpacked(start))[offset - start : stop - start])
            offset = stop
        return b"".join(parts)

    async def close(self) -> None:
        try:
            await self.storage.close()
        finally:
            if self._backing is not None:
                await self._backing.close()

    def _walk(self, position: int, end: int) -> tuple[list[Run], int]:
        """Runs from `position` on, and where they end: at `end`, or before a page not in memory, or at the work limit.

        Raises _PageMissing if already the first page is not in memory.
        """
        runs: list[Run] = []
        try:
            for _ in range(_WALK_ENTRIES // self.header.page_entries):
                if position >= end:
                    break
                position = self._map_page(position, end, runs)
        except _PageMissing:
            if not runs:
                raise
        return runs, position

    def _map_page(self, position: int, end: int, runs: list[Run]) -> int:
        """Append the runs of one L2 page, or of an L2 table that is not there. Returns where they end."""
        header = self.header
        entries = self._l2_page(position)
        bits = header.table_coverage_bits if entries is None else header.page_coverage_bits
        start = position >> bits << bits
        stop = min(end, start + (1 << bits))
        if entries is None:
            append_run(runs, Kind.UNALLOCATED, stop - position)
        else:
            self._mapper.append(runs, entries, start >> header.cluster_bits, position, stop, self._end_of_file)
        return stop

    def _l2_page(self, position: int) -> array[int] | None:
        """The page of L2 entries that maps guest `position`, None where there is no L2 table. Raises _PageMissing."""
        header = self.header
        index = position >> header.table_coverage_bits
        start = index * ENTRY_SIZE & -PAGE_SIZE
        size = min(PAGE_SIZE, header.l1_entries * ENTRY_SIZE - start)
        table = self._page(header.l1_table_offset + start, size)[index & (PAGE_ENTRIES - 1)] & ENTRY_OFFSET
        if table == 0:
            return None
        if table & (header.cluster_size - 1):
            raise CorruptError(
                self.path, f"the l2 table of guest offset {position} is not cluster-aligned ({table:#x})"
            )
        in_table = (position >> header.cluster_bits) * ENTRY_SIZE & (header.cluster_size - 1)
        return self._page(table + (in_table & -header.page_bytes), header.page_bytes)

    def _page(self, host: int, size: int) -> array[int]:
        page = _Page(host, size)
        entries = self._tables.get(page)
        if entries is None:
            raise _PageMissing(page)
        return entries

    async def _load(self, page: _Page) -> None:
        file_size = self.storage.size()
        if page.host + page.size > file_size:
            raise CorruptError(
                self.path,
                f"a table lies at {page.host:#x}, past the end of the file ({file_size} bytes); "
                "the file is cut off or corrupt",
            )
        entries = array("Q", await read(self.storage, page.host, page.size))
        if sys.byteorder == "little":
            entries.byteswap()
        # An image that another process writes grows. What a table points at was there before the table.
        self._end_of_file = self.storage.size()
        self._tables.put(page, entries)

    async def _unpacked(self, position: int) -> bytes:
        """The compressed cluster that starts at guest `position`, whole."""
        entry = await self._entry(position)
        if not entry & ENTRY_COMPRESSED:
            raise CorruptError(self.path, f"the cluster of guest offset {position} is not compressed any more")
        data = self._clusters.get(entry)
        if data is None:
            # Readers of one cluster come in crowds (read-ahead): the first one works, the others find it done.
            async with self._unpackers[(position >> self.header.cluster_bits) % _UNPACKERS]:
                data = self._clusters.get(entry)
                if data is None:
                    data = await unpack(self.storage, self.header, entry, position, self._end_of_file)
                    self._clusters.put(entry, data)
        return data

    async def _entry(self, position: int) -> int:
        """The L2 entry of guest `position`, 0 without an L2 table."""
        while True:
            try:
                entries = self._l2_page(position)
            except _PageMissing as missing:
                await self._load(missing.page)
            else:
                index = (position >> self.header.cluster_bits) & (self.header.page_entries - 1)
                return 0 if entries is None else entries[index]
