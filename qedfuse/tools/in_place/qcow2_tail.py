"""What comes behind the end of a qcow2 image that becomes a QED image: tables, and unpacked clusters.

The L1 table comes first, from a whole cluster on, then the L2 tables that are needed, one behind the other, then the
clusters. Where each lies is known from how many there are.

A QED table of n clusters maps what n of qcow2's do, entry by entry. So the tables are translated chunk by chunk, in the
same walk that has counted what is needed.

Source: QEMU docs/interop/qcow2, docs/interop/qed_spec.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import groupby

from qedfuse.errors import CorruptError
from qedfuse.host.chunks import pack_entry
from qedfuse.host.storage import Storage, read
from qedfuse.host.waiting import Breather
from qedfuse.layers.qcow2.header import Qcow2Header
from qedfuse.layers.qcow2.unpack import unpack
from qedfuse.progress import Report
from qedfuse.qed.header import HEADER_BYTES, Header
from qedfuse.sizes import ENTRY_SIZE, PAGE_ENTRIES, PAGE_SIZE, SECTOR_SIZE
from qedfuse.tools.in_place.qcow2_entries import translate
from qedfuse.tools.in_place.qcow2_scan import Demand
from qedfuse.tools.in_place.qcow2_walk import L2Chunks, L2Tables


class Tail:
    """`old_size` is the file's (bytes), `old` the image's header, `new` the QED header; `demand` is from the scan of
    this very file. `name` (empty: none) goes to `name_offset`, in the first sector or in a part of the first cluster
    that has no meaning.

    `end`: how far the file must reach, in bytes.
    """

    def __init__(
        self, old_size: int, old: Qcow2Header, new: Header, demand: Demand, name: bytes, name_offset: int
    ) -> None:
        self._old_size = old_size
        self._old = old
        self._new = new
        self._tables = demand.tables
        self._name = name
        self._name_offset = name_offset
        self._overwritten: bytes | None = None
        self._first_unpacked = self._table_place(len(demand.tables))
        self.end = self._first_unpacked + demand.compressed * new.cluster_size

    async def write(self, storage: Storage, progress: Report) -> bytes:
        """Write it all, to a file that reads as zeroes up to `end`, and return the first sector.

        `progress(done, total)` counts clusters of the disk. Raises CorruptError (a stream that cannot be unpacked),
        OSError.
        """
        await self._write_l2(storage, progress)
        await self._write_l1(storage)
        sector = bytearray(SECTOR_SIZE)
        sector[:HEADER_BYTES] = self._new.encode()
        if self._name_offset >= SECTOR_SIZE:
            self._overwritten = await read(storage, self._name_offset, len(self._name))
            await storage.write(self._name_offset, [self._name])
        elif self._name:
            sector[self._name_offset : self._name_offset + len(self._name)] = self._name
        return bytes(sector)

    async def restore_name(self, storage: Storage) -> None:
        """What the name was written over comes back. Raises OSError."""
        if self._overwritten is not None:
            await storage.write(self._name_offset, [self._overwritten])

    def _table_place(self, number: int) -> int:
        return self._new.l1_table_offset + (1 + number) * self._new.geometry.table_bytes

    async def _write_l2(self, storage: Storage, progress: Report) -> None:
        old, geometry, breathe = self._old, self._new.geometry, Breather()
        total = geometry.clusters_for(old.size)
        unpacked = self._first_unpacked
        async for index, offset in L2Tables(storage, old, breathe):
            async for first, chunk in L2Chunks(storage, old, index, offset, breathe):
                entries, compressed = translate(chunk, old, first, storage.path)
                for position, entry in compressed:
                    if unpacked >= self.end:
                        raise self._changed(storage)
                    guest = first + position
                    progress(guest, total)
                    data = await unpack(storage, old, entry, guest << old.cluster_bits, self._old_size)
                    await storage.write(unpacked, [data])
                    pack_entry(entries, position, unpacked)
                    unpacked += geometry.cluster_size
                table, position = divmod(first, geometry.table_entries)
                place = self._table_place(bisect_left(self._tables, table))
                if place >= self._first_unpacked:
                    raise self._changed(storage)
                await storage.write(place + position * ENTRY_SIZE, [entries])
                progress(first, total)

    async def _write_l1(self, storage: Storage) -> None:
        """Page by page, as far as there are L2 tables."""
        for page, tables in groupby(enumerate(self._tables), key=lambda table: table[1] // PAGE_ENTRIES):
            entries = bytearray(PAGE_SIZE)
            for number, index in tables:
                pack_entry(entries, index % PAGE_ENTRIES, self._table_place(number))
            await storage.write(self._new.l1_table_offset + page * PAGE_SIZE, [entries])

    def _changed(self, storage: Storage) -> CorruptError:
        return CorruptError(storage.path, "was changed by another program while it was converted")
