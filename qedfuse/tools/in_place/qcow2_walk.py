"""Walking the tables of a qcow2 image: L2 tables as far as they map the inside of the disk, and reference counts.

Holes and zeroes of tables cost nothing. Source: QEMU docs/interop/qcow2, "Cluster mapping", "Host cluster management".
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from itertools import compress
from typing import Self

from qedfuse.host.chunks import TableChunks
from qedfuse.host.storage import ReadStorage
from qedfuse.host.waiting import Breather
from qedfuse.layers.qcow2.entries import ENTRY_OFFSET
from qedfuse.layers.qcow2.header import Qcow2Header
from qedfuse.sizes import ENTRY_SIZE, round_down

_BLOCK_OFFSET = -512 & (1 << 64) - 1


class _Offsets:
    """Index and value of every entry in a table of offsets that is not 0, flags taken off. See `TableChunks`."""

    def __init__(self, chunks: TableChunks, mask: int) -> None:
        self._chunks = chunks
        self._mask = mask
        self._found: Iterator[tuple[int, int]] = iter(())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, int]:
        while True:
            for index, entry in self._found:
                if offset := entry & self._mask:
                    return index, offset
            position, chunk = await self._chunks.__anext__()
            entries = array("Q", bytes(chunk))
            if sys.byteorder == "little":
                entries.byteswap()
            self._found = compress(enumerate(entries, position // ENTRY_SIZE), entries)


class L2Tables(_Offsets):
    """Index (in the L1 table) and offset of every L2 table. Raises OSError."""

    def __init__(self, storage: ReadStorage, header: Qcow2Header, breathe: Breather) -> None:
        size = header.l1_entries * ENTRY_SIZE
        super().__init__(TableChunks(storage, header.l1_table_offset, size, breathe), ENTRY_OFFSET)


class RefcountBlocks(_Offsets):
    """Number and offset of every block of reference counts. Raises OSError."""

    def __init__(self, storage: ReadStorage, header: Qcow2Header, breathe: Breather) -> None:
        size = header.refcount_table_clusters << header.cluster_bits
        super().__init__(_inside(storage, header.refcount_table_offset, size, breathe), _BLOCK_OFFSET)


class L2Chunks:
    """The parts of L2 table `index` at `offset` that are not all zeroes and map the inside of the disk: the guest
    cluster (a number) of the first entry, and the bytes. Raises OSError."""

    def __init__(self, storage: ReadStorage, header: Qcow2Header, index: int, offset: int, breathe: Breather) -> None:
        self._first = index * (header.cluster_size // ENTRY_SIZE)
        self._chunks = TableChunks(storage, offset, bytes_inside(header, index), breathe)

    def __aiter__(self) -> L2Chunks:
        return self

    async def __anext__(self) -> tuple[int, bytearray]:
        position, chunk = await self._chunks.__anext__()
        return self._first + position // ENTRY_SIZE, chunk


def block_chunks(storage: ReadStorage, header: Qcow2Header, offset: int, breathe: Breather) -> TableChunks:
    """The parts of a block of reference counts that are not all zeroes. What the end of the file cuts off is."""
    return _inside(storage, offset, header.cluster_size, breathe)


def _inside(storage: ReadStorage, offset: int, size: int, breathe: Breather) -> TableChunks:
    inside = round_down(storage.size() - offset, ENTRY_SIZE)
    return TableChunks(storage, offset, max(0, min(size, inside)), breathe)


def bytes_inside(header: Qcow2Header, index: int) -> int:
    """How many bytes of L2 table `index` map the inside of the disk."""
    clusters = -(-header.size >> header.cluster_bits) - index * (header.cluster_size // ENTRY_SIZE)
    return min(max(clusters, 0) * ENTRY_SIZE, header.cluster_size)
