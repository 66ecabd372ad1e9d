"""Whether a new image still is as its conversion left it at the switch.

The conversion is gone through again, on the old image, which is there but for its first sector. Nothing is written:
what would be written must be there already, and else nothing behind the old end. If another program has used the new
image, what it wrote is lost once the old one is back.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

from qedfuse.chain.unfinished import Unfinished
from qedfuse.errors import QedfuseError
from qedfuse.host.storage import Buffer, HostExtent, Storage, find_extents, read
from qedfuse.sizes import SECTOR_SIZE
from qedfuse.tools.in_place.plan import Converter, Wanted

#: Bytes that are compared at once.
_PIECE = 1 << 20


class _DifferentError(Exception):
    """What is there is not what would be written."""


class _Rehearsal:
    """A `storage.Storage` that reads as the old image, `size` bytes long, and compares what is written to it."""

    fixed = False
    writable = True

    def __init__(self, storage: Storage, old_first: bytes, size: int) -> None:
        self.path = storage.path
        self._storage = storage
        self._old_first = old_first
        self._size = size
        self._compared: list[tuple[int, int]] = []

    async def expect_nothing_else(self) -> None:
        """Raise _DifferentError if there is anything behind the old end that would not be written."""
        end = self._storage.size()
        behind = sorted((start, stop) for start, stop in self._compared if stop > self._size)
        for (_, start), (stop, _) in pairwise([(0, self._size), *behind, (end, end)]):
            await self.punch(start, stop - start)

    def size(self) -> int:
        return self._size

    def stat(self) -> os.stat_result:
        return self._storage.stat()

    def read_into_nowait(self, offset: int, target: memoryview) -> bool:
        return offset >= SECTOR_SIZE and self._storage.read_into_nowait(offset, target)

    async def read_into(self, offset: int, target: memoryview) -> None:
        await self._storage.read_into(offset, target)
        first = self._old_first[offset : offset + len(target)]
        target[: len(first)] = first

    def next_data(self, offset: int) -> int | None:
        return offset if offset < SECTOR_SIZE else self._storage.next_data(offset)

    def next_hole(self, offset: int) -> int:
        return self._storage.next_hole(max(offset, SECTOR_SIZE))

    async def find_extents(self, ranges: Sequence[tuple[int, int]], most: int) -> list[HostExtent]:
        return find_extents(self, ranges, most)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return False

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        content = b"".join(buffers)
        stop = offset + len(content)
        if stop > self._storage.size() or await read(self._storage, offset, len(content)) != content:
            raise _DifferentError
        start = self._compared.pop()[0] if self._compared and self._compared[-1][1] == offset else offset
        self._compared.append((start, stop))

    async def punch(self, offset: int, size: int) -> None:
        if not await is_zero(self._storage, offset, min(offset + size, self._storage.size())):
            raise _DifferentError

    async def deallocate(self, runs: Sequence[tuple[int, int]]) -> bool:
        for offset, size in runs:
            await self.punch(offset, size)
        return True

    def write_behind(self, offset: int, size: int) -> None:
        """Nothing is written."""

    async def sync(self) -> None:
        """Nothing is written."""

    async def truncate(self, size: int) -> None:
        """The size is looked at by itself."""

    async def reserve(self, offset: int, size: int) -> None:
        """The room is there."""

    async def close(self) -> None:
        """The file stays open."""


async def is_unused(storage: Storage, unfinished: Unfinished, size: int, converter: Converter, wanted: Wanted) -> bool:
    """Whether what the conversion has written before its switch is there, unchanged, and nothing else. `size`: that of
    the old image then (bytes); `wanted`: what the new one is. Raises OSError."""
    if storage.size() != unfinished.grown_size:
        return False
    rehearsal = _Rehearsal(storage, unfinished.old_first, size)
    try:
        conversion = await converter.plan(rehearsal, wanted, _silent)
        if await conversion.write_tail(rehearsal, _silent) != unfinished.new_first:
            return False
        await rehearsal.expect_nothing_else()
    except (QedfuseError, _DifferentError):
        return False
    return True


async def is_zero(storage: Storage, start: int, end: int) -> bool:
    """Whether a range inside the file reads as zeroes. Raises OSError."""
    while (data := storage.next_data(start)) is not None and data < end:
        start = min(storage.next_hole(data), data + _PIECE, end)
        if any(await read(storage, data, start - data)):
            return False
    return True


def _silent(_done: int, _total: int) -> None:
    pass
