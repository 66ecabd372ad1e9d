"""A QED image as it is read: what `image.py` can write.

A request that needs no waiting (its table pages are in memory, the host has it in the page cache) is done inline
by the `_nowait` functions, without a lock: nothing else runs meanwhile. Everything else holds a range lock.
"""

from __future__ import annotations

from qedfuse.host.storage import Storage
from qedfuse.layers.extents import HostExtents
from qedfuse.layers.layer import Layer
from qedfuse.layers.resolve import read_extents, read_extents_nowait, resolve, resolve_nowait
from qedfuse.layers.runs import Kind, Run
from qedfuse.qed.geometry import UNALLOCATED, ZERO_CLUSTER, Geometry
from qedfuse.qed.header import Header
from qedfuse.qed.range_lock import RangeLock
from qedfuse.qed.table_pages import PagePool, shared_pool
from qedfuse.qed.tables import Tables
from qedfuse.sizes import PAGE_BITS, PAGE_ENTRIES, GuestOffset

_ENTRY_MASK = PAGE_ENTRIES - 1


class QedLayer:
    """See `layers.layer.Layer`. `backing` is the layer below, None if the header names none; it and `storage` are owned
    and closed with the layer. `lenient`: see `Tables`. `pool` bounds the memory for tables (by default shared by all
    images of the thread). Errors are OSErrors: what the host said, EIO for a corrupt table.
    """

    format = "qed"

    def __init__(
        self, storage: Storage, header: Header, backing: Layer | None, *, lenient: bool, pool: PagePool | None
    ) -> None:
        if header.has_backing_file is not (backing is not None):
            raise ValueError(f"{storage.path}: the header and the layer below disagree on a backing file")
        self.path = storage.path
        self.storage = storage
        self.geometry: Geometry = header.geometry
        self._backing = backing
        self._header = header
        self._bits = self.geometry.cluster_bits
        self._mask = self.geometry.cluster_size - 1
        self._tables = Tables(storage, header, pool or shared_pool(), lenient=lenient)
        self._l2_pages = self._tables.l2.pages
        self._locks = RangeLock()

    @property
    def size(self) -> GuestOffset:
        """Bytes that the guest sees."""
        return GuestOffset(self._header.image_size)

    @property
    def backing(self) -> Layer | None:
        return self._backing

    @property
    def header(self) -> Header:
        """As in the file."""
        return self._header

    @property
    def version(self) -> tuple[int, int, int]:
        """See `Layer.version`."""
        return 0, 0, self.size

    @property
    def tables(self) -> Tables:
        """The mapping, which the image and its committer alone change."""
        return self._tables

    @property
    def locks(self) -> RangeLock:
        """On ranges of guest clusters."""
        return self._locks

    def read_nowait(self, offset: int, size: int) -> bytes | bytearray | None:
        """As `read`, if it can be done inline; None if it can't."""
        end = self.size
        if offset + size > end:
            size = max(0, end - offset)
        if (offset ^ (offset + size - 1)) >> self._bits == 0:  # one cluster, the common case
            cluster = offset >> self._bits
            page = self._l2_pages.get(cluster >> PAGE_BITS)
            if page is None:
                return self._read_mapped_nowait(offset, size)
            entry = page[cluster & _ENTRY_MASK]
            if entry > ZERO_CLUSTER and self._tables.holds(entry, self._mask + 1):
                buffer = bytearray(size)
                host = entry + (offset & self._mask)
                return buffer if self.storage.read_into_nowait(host, memoryview(buffer)) else None
            if entry == ZERO_CLUSTER or (entry == UNALLOCATED and self._backing is None):
                return bytes(size)
        return self._read_mapped_nowait(offset, size)

    def _read_mapped_nowait(self, offset: int, size: int) -> bytes | bytearray | None:
        extents = resolve_nowait(self, offset, size) if size else []
        return None if extents is None else read_extents_nowait(extents, offset, size)

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """`size` bytes at `offset`; fewer, or none, at the end of the image. Raises OSError."""
        data = self.read_nowait(offset, size)
        if data is not None:
            return data
        async with self._locks.hold(*self._clusters(offset, size), exclusive=False):
            size = max(0, min(size, self.size - offset))
            return await read_extents(await resolve(self, offset, size), offset, size) if size else b""

    def map_nowait(self, offset: int, size: int) -> list[Run] | None:
        runs = self._tables.map_prefix(GuestOffset(offset), size)
        return runs if sum(run.length for run in runs) == size else None

    async def map(self, offset: int, size: int, extents: HostExtents | None = None) -> list[Run]:
        """See `Layer.map`. Source of the entries' meaning: qed_spec, "Data cluster offsets"."""
        if extents is not None:
            version = self.version
            blank = await self._tables.measure_blank(GuestOffset(offset), size, extents)
            if blank and version == self.version:  # no page of a table has been written since, and left memory
                return [Run(Kind.UNALLOCATED, blank)]
        return await self._tables.map(GuestOffset(offset), size)

    async def read_indirect(self, offset: int, size: int) -> bytes:
        raise AssertionError("a qed image has nothing indirect")

    async def close(self) -> None:
        """Close the file, and the layers below. Idempotent."""
        self._tables.close()
        try:
            await self.storage.close()
        finally:
            if self._backing:
                await self._backing.close()

    def _clusters(self, offset: int, size: int) -> tuple[int, int]:
        return offset >> self._bits, (offset + size + self._mask) >> self._bits
