"""A map of the file's clusters: which of them something refers to."""

from __future__ import annotations

from typing import NamedTuple

from qedfuse.errors import CorruptError
from qedfuse.host.chunks import TableChunks
from qedfuse.host.storage import Storage, held_bytes
from qedfuse.host.waiting import Breather
from qedfuse.native import _clustermap as native
from qedfuse.native._clustermap import Bitmap
from qedfuse.qed.geometry import ZERO_CLUSTER
from qedfuse.qed.table_walk import Bounds, L1Entries
from qedfuse.sizes import ENTRY_SIZE

assert (native.ENTRY_SIZE, native.ZERO_CLUSTER) == (ENTRY_SIZE, ZERO_CLUSTER)


class Marks(NamedTuple):
    """What one chunk of L2 entries holds.

    `allocated` counts entries that are neither 0 nor 1, `fragmented` those of them that do not follow the one before,
    `last` is the last of them. `invalid` (an impossible offset) and `again` (a cluster marked before) are positions in
    the chunk, in entries, ascending.
    """

    allocated: int
    fragmented: int
    last: int
    invalid: list[int]
    again: list[int]


class ClusterMap(Bitmap):
    """One bit for every cluster of the file, in parts of 8 MiB that exist once something in them is marked.

    The parts together may take 160 MiB, and more only as far as the file really holds that much data: a sparse file
    that scatters a few references over exabytes raises CorruptError instead of eating the memory.
    """

    _MAX_PARTS = 20

    def __new__(cls, storage: Storage, bounds: Bounds) -> ClusterMap:
        header = bounds.header
        held = held_bytes(storage) // header.cluster_size
        return super().__new__(
            cls,
            clusters=bounds.end // header.cluster_size,
            start=header.header_size,
            cluster_bits=header.geometry.cluster_bits,
            parts=cls._MAX_PARTS + held // native.PART_CLUSTERS,
        )

    def __init__(self, storage: Storage, bounds: Bounds) -> None:
        self._path = storage.path

    def mark(self, first: int, number: int) -> int:
        """Mark a run of clusters. Returns how many of them were marked before."""
        try:
            return super().mark(first, number)
        except OverflowError:
            raise self._scattered() from None

    def mark_entries(self, chunk: bytes | bytearray, last: int = 0) -> Marks:
        """Mark what a chunk of L2 entries refers to, as far as it is possible.

        `last`: the last allocated entry before the chunk in its table, 0 if there is none.
        """
        try:
            return Marks(*super().mark_entries(chunk, last))
        except OverflowError:
            raise self._scattered() from None

    def _scattered(self) -> CorruptError:
        return CorruptError(
            self._path, "the tables scatter too few clusters over too large a sparse file to check it in bounded memory"
        )


async def read_used(storage: Storage, bounds: Bounds, breathe: Breather, *, inside: bool = False) -> ClusterMap:
    """What the tables in the file refer to, and they themselves. `inside`: as far as they map the inside of the image.
    What is impossible is passed over. Raises OSError; CorruptError if tables overlap: following them might take for
    ever."""
    header, geometry = bounds.header, bounds.header.geometry
    used = ClusterMap(storage, bounds)
    used.mark(header.l1_table_offset // header.cluster_size, header.table_size)
    async for index, offset in L1Entries(storage, header, breathe):
        size = bounds.entries_inside(index) * ENTRY_SIZE if inside else geometry.table_bytes
        if not size or not bounds.holds(offset, geometry.table_bytes):
            continue
        if used.mark(offset // header.cluster_size, header.table_size):
            raise CorruptError(storage.path, "its tables overlap; see qedfuse check")
        async for _position, chunk in TableChunks(storage, offset, size, breathe):
            used.mark_entries(chunk)
    return used
