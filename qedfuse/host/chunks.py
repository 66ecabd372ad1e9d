"""Tables of a file, part by part.

A table is read in chunks of at most 256 KiB; holes and zeroes cost nothing.
"""

from __future__ import annotations

import struct
import sys
from array import array

from qedfuse.host.storage import ReadStorage, Storage, fill
from qedfuse.host.waiting import Breather
from qedfuse.sizes import ENTRY_SIZE, PAGE_SIZE, round_down, round_up

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


class TableChunks:
    """The parts of the table at `offset` that are not all zeroes: position in the table (bytes) and content.

    An asynchronous iterator (not a generator, which would have to be closed). The chunk is the caller's to change.
    Raises OSError. Holes of the file cost nothing, however large the table.
    """

    def __init__(self, storage: ReadStorage, offset: int, size: int, breathe: Breather) -> None:
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
