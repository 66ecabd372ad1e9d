"""Walking the tables of an image: what check and repair have in common.

A table is read in chunks of at most 256 KiB; holes and zeroes cost nothing. `clustermap.py` says what is in a chunk of
L2 entries, and remembers what has been referred to.
"""

from __future__ import annotations

import struct
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress

from qedfuse.blocking import checkpoint
from qedfuse.geometry import ENTRY_SIZE, PAGE_SIZE, round_down, round_up, whole_sectors
from qedfuse.header import Header
from qedfuse.storage import Storage, fill

#: Bytes of a table that are handled without letting other tasks run; a few milliseconds of work.
CHUNK_SIZE = 256 << 10

_ZEROES = memoryview(bytes(CHUNK_SIZE))
_ENTRY = struct.Struct("<Q")


def unpack_entries(chunk: bytes | bytearray) -> array[int]:
    """A table's bytes as numbers."""
    entries = array("Q", bytes(chunk))
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def entry_at(chunk: bytes | bytearray, number: int) -> int:
    """The value of one entry of a table's bytes."""
    value: int = _ENTRY.unpack_from(chunk, number * ENTRY_SIZE)[0]
    return value


def pack_entry(chunk: bytearray, number: int, value: int) -> None:
    """Give an entry of a table's bytes a value."""
    _ENTRY.pack_into(chunk, number * ENTRY_SIZE, value)


async def write_changes(storage: Storage, offset: int, before: bytes, after: bytearray) -> None:
    """Write those pages of a part of a table, at `offset` in the file, that have changed. Raises OSError."""
    for start in range(0, len(after), PAGE_SIZE):
        page = after[start : start + PAGE_SIZE]
        if page != before[start : start + PAGE_SIZE]:
            await storage.write(offset + start, [page])


#: Seconds of work after which other tasks have their turn.
_BREATH = 0.005


class Breather:
    """Lets other tasks run, and cancellation in, every few milliseconds. One for a whole job, however many loops."""

    def __init__(self) -> None:
        self._due = time.monotonic() + _BREATH

    async def __call__(self) -> None:
        if time.monotonic() >= self._due:
            await checkpoint()
            self._due = time.monotonic() + _BREATH


class TableChunks:
    """The parts of the table at `offset` that are not all zeroes: position in the table (bytes) and content.

    An asynchronous iterator (not a generator, which would have to be closed). The chunk is the caller's to change.
    Raises OSError. Holes of the file cost nothing, however large the table.
    """

    def __init__(self, storage: Storage, offset: int, size: int, breathe: Breather) -> None:
        self._storage = storage
        self._offset = offset
        self._size = size
        self._position = 0
        self._breathe = breathe

    def __aiter__(self) -> TableChunks:
        return self

    async def __anext__(self) -> tuple[int, bytearray]:
        while self._position < self._size:
            await self._breathe()
            data = self._storage.next_data(self._offset + self._position)
            if data is None or data >= self._offset + self._size:
                break
            position = max(self._position, round_down(data - self._offset, PAGE_SIZE))
            stop = min(round_down(position, CHUNK_SIZE) + CHUNK_SIZE, self._size)
            hole = round_up(self._storage.next_hole(data) - self._offset, PAGE_SIZE)
            chunk = bytearray(min(stop, hole) - position)
            with memoryview(chunk) as target:
                await fill(self._storage, self._offset + position, target)
            self._position = position + len(chunk)
            if chunk != _ZEROES[: len(chunk)]:
                return position, chunk
        raise StopAsyncIteration


class L1Entries:
    """Index and value of every L1 entry that is not 0, also those past the image's end. Raises OSError."""

    def __init__(self, storage: Storage, header: Header, breathe: Breather) -> None:
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
        return (
            not offset & (self.header.cluster_size - 1)
            and offset >= self.header.header_bytes
            and offset + size <= self.end
        )

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
