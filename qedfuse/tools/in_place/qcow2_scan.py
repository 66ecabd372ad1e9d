"""Whether a qcow2 image is in order, and what becoming a QED image takes, by one walk over its tables.

In order means: whatever the tables lead to lies inside the file and is led to once. Each cluster of the file is the
header, a part of a table, a block of reference counts, one cluster of the disk, or the place of compressed clusters,
which may share one. No reference count is above one, but for the last kind.

What the image does not say by its tables (persistent bitmaps, say) is not looked at. Reference counts of 0 for what is
used are no obstacle: QED has none.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from qedfuse.errors import CorruptError, UnsupportedError
from qedfuse.host.chunks import entry_at
from qedfuse.host.storage import Storage
from qedfuse.host.waiting import Breather
from qedfuse.layers.qcow2.entries import compressed_extent
from qedfuse.layers.qcow2.header import Qcow2Header
from qedfuse.progress import Report
from qedfuse.qed.cluster_map import ClusterMap
from qedfuse.qed.header import Header
from qedfuse.qed.table_walk import Bounds
from qedfuse.sizes import ENTRY_SIZE, round_up
from qedfuse.tools.in_place.qcow2_entries import translate
from qedfuse.tools.in_place.qcow2_refcounts import above_one, end_of_counts
from qedfuse.tools.in_place.qcow2_walk import L2Chunks, L2Tables, RefcountBlocks, block_chunks, bytes_inside

_REPAIR = "check and repair it first: qemu-img check -r all"


@dataclass
class Demand:
    """`tables`: the L1 entries, by index and ascending, that the QED image needs an L2 table for. `compressed`: how
    many clusters must be unpacked."""

    tables: array[int] = field(default_factory=lambda: array("Q"))
    compressed: int = 0


async def scan(storage: Storage, old: Qcow2Header, new: Header, progress: Report) -> Demand:
    """Walk all tables of the qcow2 image. `new` has the geometry and the size of the QED image.

    `progress(done, total)` counts L1 entries. Memory: two bits for each cluster of the file, and 8 bytes for each
    table. Raises CorruptError (not in order), UnsupportedError (a reference count above one), OSError.
    """
    return await _Scan(storage, old, new).run(progress)


class _Scan:
    """`_used`: what has been led to. `_packed`: what of it holds compressed clusters."""

    def __init__(self, storage: Storage, old: Qcow2Header, new: Header) -> None:
        self._storage = storage
        self._old = old
        self._file_size = storage.size()
        # A last cluster that the end of the file cuts is one: the file will grow.
        self._bounds = Bounds.of(new, round_up(self._file_size, old.cluster_size))
        self._used = ClusterMap(storage, self._bounds)
        self._packed = ClusterMap(storage, self._bounds)
        self._breathe = Breather()

    async def run(self, progress: Report) -> Demand:
        old, demand = self._old, Demand()
        if old.l1_size:
            self._mark(old.l1_table_offset, old.l1_size * ENTRY_SIZE, "the l1 table")
        async for index, offset in L2Tables(self._storage, old, self._breathe):
            progress(index, old.l1_entries)
            if offset + bytes_inside(old, index) > self._file_size:
                raise self._corrupt(f"an l2 table ({offset:#x}) lies outside the file")
            self._mark(offset, old.cluster_size, "an l2 table")
            await self._scan_l2(index, offset, demand)
        await self._scan_refcounts()
        return demand

    async def _scan_l2(self, index: int, offset: int, demand: Demand) -> None:
        geometry = self._bounds.header.geometry
        async for first, chunk in L2Chunks(self._storage, self._old, index, offset, self._breathe):
            entries, compressed = translate(chunk, self._old, first, self._storage.path)
            marks = self._used.mark_entries(entries)
            for number in sorted(marks.invalid + marks.again):
                cluster, guest = entry_at(entries, number), (first + number) << self._old.cluster_bits
                what = f"the data cluster of guest offset {guest}"
                raise self._fault(cluster, self._old.cluster_size, what, again=number in marks.again)
            for number, entry in compressed:
                self._mark_compressed(entry, (first + number) << self._old.cluster_bits)
            demand.compressed += len(compressed)
            table = first // geometry.table_entries
            if not demand.tables or demand.tables[-1] != table:
                demand.tables.append(table)

    def _mark(self, offset: int, size: int, what: str) -> None:
        size = round_up(size, self._old.cluster_size)
        if not self._bounds.holds(offset, size):
            raise self._fault(offset, size, what)
        if self._used.mark(offset >> self._old.cluster_bits, size >> self._old.cluster_bits):
            raise self._fault(offset, size, what, again=True)

    def _mark_compressed(self, entry: int, guest: int) -> None:
        offset, size = compressed_extent(entry, self._old.cluster_bits)
        what = f"the compressed cluster of guest offset {guest}"
        if offset < self._bounds.header.header_bytes:
            raise self._corrupt(f"{what} ({offset:#x}) lies in the header")
        if offset >= self._file_size:
            raise self._corrupt(f"{what} ({offset:#x}) lies outside the file")
        last = min(offset + size, self._bounds.end) - 1 >> self._old.cluster_bits
        for cluster in range(offset >> self._old.cluster_bits, last + 1):
            if not self._packed.mark(cluster, 1) and self._used.mark(cluster, 1):
                raise self._fault(offset, size, what, again=True)

    def _fault(self, offset: int, size: int, what: str, *, again: bool = False) -> CorruptError:
        fault = "is used for something else, too" if again else self._bounds.fault(offset, size)
        return self._corrupt(f"{what} ({offset:#x}) {fault}")

    def _corrupt(self, fault: str) -> CorruptError:
        return CorruptError(self._storage.path, f"{fault}; {_REPAIR}")

    async def _scan_refcounts(self) -> None:
        """Mark the reference counts' own clusters, and refuse counts above one."""
        old = self._old
        size = old.refcount_table_clusters << old.cluster_bits
        self._mark(old.refcount_table_offset, size, "the table of reference counts")
        async for number, offset in RefcountBlocks(self._storage, old, self._breathe):
            self._mark(offset, old.cluster_size, "a block of reference counts")
            await self._scan_block(number, offset)

    async def _scan_block(self, number: int, offset: int) -> None:
        bits = self._old.refcount_bits
        first = number * (self._old.cluster_size * 8 // bits)
        async for position, chunk in block_chunks(self._storage, self._old, offset, self._breathe):
            for place, count in above_one(chunk, bits):
                cluster = first + position * 8 // bits + place
                if cluster < self._used.clusters and self._packed.next_marked(cluster) != cluster:
                    raise UnsupportedError(
                        self._storage.path,
                        f"the cluster at {cluster << self._old.cluster_bits:#x} has a reference count of {count}: a "
                        "snapshot shares it, or the count is wrong (qemu-img check -r leaks puts that right)",
                    )


async def end_in_use(storage: Storage, old: Qcow2Header) -> int:
    """Behind the last cluster (bytes) whose reference count is not 0: of an image that was closed cleanly.

    Raises CorruptError, OSError.
    """
    end, breathe, seen = 0, Breather(), set()
    async for number, offset in RefcountBlocks(storage, old, breathe):
        if offset in seen or offset >= storage.size():
            raise CorruptError(
                storage.path, f"a block of reference counts ({offset:#x}) is no place for one; {_REPAIR}"
            )
        seen.add(offset)
        async for position, chunk in block_chunks(storage, old, offset, breathe):
            bits = position * 8 + end_of_counts(chunk)
            end = max(end, number * (old.cluster_size * 8 // old.refcount_bits) + -(-bits // old.refcount_bits))
    return end << old.cluster_bits
