"""Walking the tables in an image's file, and where what they refer to may lie: check, repair and others share it.

`cluster_map.py` says what is in a chunk of L2 entries, and remembers what has been referred to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress

from qedfuse.errors import CorruptError
from qedfuse.host.chunks import TableChunks, unpack_entries
from qedfuse.host.storage import ReadStorage
from qedfuse.host.waiting import Breather
from qedfuse.qed.header import Header
from qedfuse.sizes import ENTRY_SIZE, round_down, whole_sectors


class L1Entries:
    """Index and value of every L1 entry that is not 0, also those past the image's end. Raises OSError."""

    def __init__(self, storage: ReadStorage, header: Header, breathe: Breather) -> None:
        self._chunks = TableChunks(storage, header.l1_table_offset, header.geometry.table_bytes, breathe)
        self._found: Iterator[tuple[int, int]] = iter(())
        self._breathe = breathe

    def __aiter__(self) -> L1Entries:
        return self

    async def __anext__(self) -> tuple[int, int]:
        await self._breathe()
        while True:
            for item in self._found:
                return item
            position, chunk = await self._chunks.__anext__()
            entries = unpack_entries(chunk)
            self._found = compress(enumerate(entries, position // ENTRY_SIZE), entries)


@dataclass(frozen=True)
class Bounds:
    """Where a reference may point: between the header and `end`, the file's size rounded down to clusters.

    `size` is the file's in whole sectors, since what the last one lacks can be read.
    """

    header: Header
    size: int
    end: int

    @classmethod
    def of(cls, header: Header, file_size: int) -> Bounds:
        size = whole_sectors(file_size)
        return cls(header, size, round_down(size, header.cluster_size))

    def holds(self, offset: int, size: int) -> bool:
        """Whether a cluster or table of `size` bytes may be at `offset`."""
        return self.header.geometry.is_place(offset, size, self.header.header_bytes, self.end)

    def cuts(self, offset: int, size: int) -> bool:
        """Whether what should be at `offset` begins inside the file and ends behind it."""
        aligned = not offset & (self.header.cluster_size - 1)
        return aligned and self.header.header_bytes <= offset < self.size < offset + size

    def fault(self, offset: int, size: int) -> str:
        """What is wrong with an offset that `holds` refused."""
        if offset & (self.header.cluster_size - 1):
            return "is not cluster-aligned"
        if self.cuts(offset, size):
            return "is cut off by the end of the file"
        return "lies in the header" if offset < self.header.header_bytes else "lies outside the file"

    def entries_inside(self, index: int) -> int:
        """How many entries of L1 entry `index`'s L2 table map the inside of the image; the rest is past its end."""
        geometry = self.header.geometry
        clusters = geometry.clusters_for(self.header.image_size) - index * geometry.table_entries
        return max(0, min(clusters, geometry.table_entries))


class GuestEntries:
    """The L2 entries of all guest clusters, ascending, in chunks: the first one's guest cluster (over the whole guest)
    and their bytes. What is left out between chunks is 0. Those past the image's end come, too.

    An asynchronous iterator. Raises OSError; CorruptError for an L2 table that is not wholly inside the file.
    """

    def __init__(self, storage: ReadStorage, bounds: Bounds, breathe: Breather) -> None:
        self._storage = storage
        self._bounds = bounds
        self._breathe = breathe
        self._tables = L1Entries(storage, bounds.header, breathe)
        self._chunks: TableChunks | None = None
        self._first = 0

    def __aiter__(self) -> GuestEntries:
        return self

    async def __anext__(self) -> tuple[int, bytearray]:
        geometry = self._bounds.header.geometry
        while True:
            if self._chunks is not None:
                try:
                    position, chunk = await self._chunks.__anext__()
                    return self._first + position // ENTRY_SIZE, chunk
                except StopAsyncIteration:
                    self._chunks = None
            index, offset = await self._tables.__anext__()
            if not self._bounds.holds(offset, geometry.table_bytes):
                fault = self._bounds.fault(offset, geometry.table_bytes)
                raise CorruptError(self._storage.path, f"the l2 table at {offset:#x} {fault}; see qedfuse check")
            self._first = index * geometry.table_entries
            self._chunks = TableChunks(self._storage, offset, geometry.table_bytes, self._breathe)
