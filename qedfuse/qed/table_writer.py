"""A new image that is filled front to back: its clusters come one behind the other, and its tables are written once.

    place      where the next clusters go: at the end of the file, behind a new L2 table where one begins
    take       they are the guest's: entries in memory, for a whole run at a time, and the table
    chunk      a part of a table, 256 KiB at most; it goes to the file when the next one begins, or the last one ends

Nothing is read, nothing written twice, and no page of a table is kept: it takes as little memory for an exabyte. There
is no order among the writes, so until all is durable the file must not look like an image: its header comes last
(`host/output_file.py`).

Source: QEMU docs/interop/qed_spec, "Tables".
"""

from __future__ import annotations

import sys
from array import array

from qedfuse.host.chunks import CHUNK_SIZE
from qedfuse.host.storage import Storage
from qedfuse.qed.header import Header
from qedfuse.sizes import ENTRY_SIZE, PAGE_ENTRIES, GuestOffset, HostOffset, round_down, round_up


class TableWriter:
    """One table of `size` bytes at `offset` of the file, which reads as zeroes there. Raises OSError."""

    def __init__(self, storage: Storage, offset: HostOffset, size: int) -> None:
        self._storage = storage
        self._offset = offset
        self._chunk = array("Q", bytes(min(size, CHUNK_SIZE)))
        self._start = 0  # the index in the table of the chunk's first entry
        self._low = self._high = 0  # the entries of the chunk that have been put lie between these

    async def put(self, index: int, entries: array[int]) -> None:
        """Entries from `index` on, none of them in a chunk that lies before one to which entries have been put."""
        size = len(self._chunk)
        while entries:
            start = round_down(index, size)
            if start != self._start:
                await self.flush()
                self._start = start
            low = index - start
            part, entries = entries[: size - low], entries[size - low :]
            high = low + len(part)
            self._chunk[low:high] = part
            self._low, self._high = (min(self._low, low), max(self._high, high)) if self._high else (low, high)
            index += len(part)

    async def flush(self) -> None:
        """Write what has been put: whole pages."""
        if not self._high:
            return
        first, last = round_down(self._low, PAGE_ENTRIES), round_up(self._high, PAGE_ENTRIES)
        pages = self._chunk[first:last]
        if sys.byteorder == "big":
            pages.byteswap()
        await self._storage.write(self._offset + (self._start + first) * ENTRY_SIZE, [pages.tobytes()])
        self._chunk = array("Q", bytes(len(self._chunk) * ENTRY_SIZE))
        self._low = self._high = 0


class SequentialWriter:
    """The mapping of a new image without a backing file, empty but for its `header`. Offsets and sizes are bytes.

    Guest ranges come in order: none begins in a cluster before the last one that was taken. Raises OSError.
    """

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self._geometry = header.geometry
        #: Where clusters end in the file; it may be shorter if the last of them is not full.
        self.end = HostOffset(header.l1_table_offset + self._geometry.table_bytes)
        self._l1 = TableWriter(storage, HostOffset(header.l1_table_offset), self._geometry.table_bytes)
        self._l2: TableWriter | None = None
        self._l1_index = -1  # whose table `_l2` is
        self._last = -1, HostOffset(0)  # the last cluster that was taken: its number, where it is

    def place(self, offset: GuestOffset, size: int) -> tuple[HostOffset, int]:
        """Where the front of a guest range is to be written, and how much of it, at least a byte. Asking is free."""
        geometry = self._geometry
        cluster, skip = offset >> geometry.cluster_bits, offset & (geometry.cluster_size - 1)
        last, host = self._last
        if cluster == last:
            return host + skip, min(size, geometry.cluster_size - skip)
        assert cluster > last
        l1_index, index = divmod(cluster, geometry.table_entries)
        start = self.end if l1_index == self._l1_index else self.end + geometry.table_bytes
        return start + skip, min(size, (geometry.table_entries - index) * geometry.cluster_size - skip)

    async def take(self, offset: GuestOffset, size: int) -> None:
        """What `place` has told of is written, or about to be."""
        geometry = self._geometry
        first, last = offset >> geometry.cluster_bits, (offset + size - 1) >> geometry.cluster_bits
        if first == self._last[0]:
            return
        l1_index, index = divmod(first, geometry.table_entries)
        if self._l2 is None or l1_index != self._l1_index:
            self._l2 = await self._begin_table(l1_index)
        end = self.end + (last - first + 1) * geometry.cluster_size
        await self._l2.put(index, array("Q", range(self.end, end, geometry.cluster_size)))
        self._last = last, end - geometry.cluster_size
        self.end = end

    async def _begin_table(self, l1_index: int) -> TableWriter:
        if self._l2:
            await self._l2.flush()
        await self._l1.put(l1_index, array("Q", [self.end]))
        self._l1_index = l1_index
        offset, self.end = self.end, self.end + self._geometry.table_bytes
        return TableWriter(self._storage, offset, self._geometry.table_bytes)

    async def finish(self) -> None:
        """Write what is left of the tables."""
        if self._l2:
            await self._l2.flush()
        await self._l1.flush()
