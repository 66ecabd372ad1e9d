"""From a raw disk to a QED image. Every cluster stays where it is, but for the first one, whose place is the header's.

    offset 0        the header (the switch); behind it still the disk's first bytes, until `finish` clears them
    cluster i       guest cluster i, for all i from 1 on: data, and holes of the host, which read as zeroes and need no
                    allocation later
    behind the disk, from a whole cluster on: a copy of guest cluster 0, the L1 table, the L2 tables one after the other

All of the file is referred to, so that no check finds a leak. Nothing is scanned: the cost is that of the tables, 8
bytes for each cluster, and those are 64 MiB at most for a disk of up to 32 TiB (the largest clusters of an image that
QEMU can open have 4 MiB), unless the caller asks for smaller clusters.
"""

from __future__ import annotations

import errno

from qedfuse.chain.unfinished import Unfinished, changed_meanwhile
from qedfuse.errors import QedfuseError
from qedfuse.host.chunks import pack_entry
from qedfuse.host.storage import Storage, fill, read
from qedfuse.host.waiting import Breather
from qedfuse.progress import Report
from qedfuse.qed.geometry import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, MAX_CLUSTER_SIZE, MAX_TABLE_SIZE, Geometry
from qedfuse.qed.header import Header
from qedfuse.qed.header_io import read_header
from qedfuse.qed.new_image import qemu_objection
from qedfuse.sizes import ENTRY_SIZE, SECTOR_SIZE, round_up
from qedfuse.tools.in_place.home_entries import HomeEntries
from qedfuse.tools.in_place.plan import Wanted
from qedfuse.tools.in_place.rehearsal import is_unused, is_zero

#: L2 entries take so many bytes at most, if larger clusters can see to it.
MAX_TABLE_BYTES = 64 << 20

#: Bytes that are written at once.
_PIECE = 1 << 20


def choose_geometry(size: int, wanted: Wanted, path: str) -> Geometry:
    """The geometry for a disk of `size` bytes. What the caller wants is as it wants; for the rest, it is one that QEMU
    can open, with clusters so large that the tables are small; else the largest that QEMU can open.

    Raises QedfuseError if what is wanted cannot map so much, with what can.
    """
    possible = _possible(size, wanted)
    if not possible:
        found = choose_geometry(size, Wanted(), path)
        hint = f"cluster_size={found.cluster_size},table_size={found.table_size} can"
        raise QedfuseError(
            path, f"its {size} bytes are more than such clusters and tables can map; {hint}", errno.EFBIG
        )
    fit = [geometry for geometry in possible if qemu_objection(geometry, size) is None] or possible
    small = (geometry for geometry in fit if geometry.clusters_for(size) * ENTRY_SIZE <= MAX_TABLE_BYTES)
    return next(small, max(fit, key=lambda geometry: geometry.cluster_size))


def _possible(size: int, wanted: Wanted) -> list[Geometry]:
    """What can map so many bytes, of what is wanted; clusters ascending, and for each the usual tables first."""
    clusters = [wanted.cluster_size] if wanted.cluster_size else _powers(DEFAULT_CLUSTER_SIZE, MAX_CLUSTER_SIZE)
    usual_first = (DEFAULT_TABLE_SIZE, *_powers(DEFAULT_TABLE_SIZE, MAX_TABLE_SIZE), DEFAULT_TABLE_SIZE // 2)
    tables = [wanted.table_size] if wanted.table_size else usual_first
    geometries = (Geometry(cluster_size, table_size) for cluster_size in clusters for table_size in tables)
    return [geometry for geometry in geometries if geometry.max_image_size >= size]


def _powers(first: int, last: int) -> list[int]:
    return [1 << bits for bits in range(first.bit_length() - 1, last.bit_length())]


class RawToQed:
    """See `plan.Converter`."""

    async def plan(self, storage: Storage, wanted: Wanted, progress: Report) -> RawToQedConversion:
        size = storage.size()
        if size == 0:
            raise QedfuseError(storage.path, "is empty: there is no disk in it", errno.EINVAL)
        if size % SECTOR_SIZE:
            message = f"its size, {size} bytes, is no multiple of {SECTOR_SIZE}"
            raise QedfuseError(
                storage.path, f"{message}; `truncate -s %{SECTOR_SIZE} {storage.path}` rounds it up", errno.EINVAL
            )
        return RawToQedConversion(size, choose_geometry(size, wanted, storage.path))

    async def resume(self, storage: Storage, unfinished: Unfinished) -> RawToQedConversion:
        if await read(storage, 0, SECTOR_SIZE) != unfinished.new_first:
            raise changed_meanwhile(unfinished, storage.path)
        header = await read_header(storage)
        return RawToQedConversion(unfinished.old_size, header.geometry)

    async def is_unused(self, storage: Storage, unfinished: Unfinished) -> bool:
        geometry = (await read_header(storage)).geometry
        wanted = Wanted(geometry.cluster_size, geometry.table_size)
        return await is_unused(storage, unfinished, unfinished.old_size, self, wanted)

    async def old_end(self, storage: Storage, unfinished: Unfinished) -> int:
        """Nothing tells what another program has put into the tail of a raw disk. But it must be this file, and this
        tail, which has no data before it is reserved: not a copy that was brought back, nor a disk that has grown."""
        first, size, old_size = await read(storage, 0, SECTOR_SIZE), storage.size(), unfinished.old_size
        grown = size > unfinished.grown_size
        if old_size < size < unfinished.grown_size:
            grown = not await is_zero(storage, old_size, size)
        if first != unfinished.old_first or grown:
            raise changed_meanwhile(unfinished, storage.path)
        return old_size


class RawToQedConversion:
    """See `plan.Conversion`."""

    altered = False

    def __init__(self, size: int, geometry: Geometry) -> None:
        self._geometry = geometry
        self._clusters = geometry.clusters_for(size)
        self._tables = -(-self._clusters // geometry.table_entries)
        self._first = round_up(size, geometry.cluster_size)
        self._l1 = self._first + geometry.cluster_size
        self._l2 = self._l1 + geometry.table_bytes
        self.old_size = size
        self.new_bytes = self._l2 + self._tables * geometry.table_bytes - size

    async def write_tail(self, storage: Storage, progress: Report) -> bytes:
        breathe = Breather()
        await self._copy_first_cluster(storage, breathe)
        table_bytes = self._geometry.table_bytes
        tables = range(self._l2, self._l2 + self._tables * table_bytes, table_bytes)
        await storage.write(self._l1, [b"".join(offset.to_bytes(ENTRY_SIZE, "little") for offset in tables)])
        await self._write_entries(storage, breathe, progress)
        return self._header().encode().ljust(SECTOR_SIZE, b"\0")

    async def _copy_first_cluster(self, storage: Storage, breathe: Breather) -> None:
        end = min(self._geometry.cluster_size, self.old_size)
        for start in range(0, end, _PIECE):
            await breathe()
            piece = bytearray(min(_PIECE, end - start))
            with memoryview(piece) as target:
                await fill(storage, start, target)
            if piece.count(0) < len(piece):
                await storage.write(self._first + start, [piece])

    async def _write_entries(self, storage: Storage, breathe: Breather, progress: Report) -> None:
        """The L2 tables lie one behind the other, so that their entries are one row."""
        step = min(_PIECE // ENTRY_SIZE, self._clusters)
        row = HomeEntries(self._geometry.cluster_size, step)
        for start in range(0, self._clusters, step):
            await breathe()
            progress(start, self._clusters)
            end = min(start + step, self._clusters)
            entries = bytearray(row.encode(start, end - start))
            if start == 0:
                pack_entry(entries, 0, self._first)
            await storage.write(self._l2 + start * ENTRY_SIZE, [entries])
        progress(self._clusters, self._clusters)

    def _header(self) -> Header:
        return Header(
            cluster_size=self._geometry.cluster_size,
            table_size=self._geometry.table_size,
            header_size=1,
            features=0,
            compat_features=0,
            autoclear_features=0,
            l1_table_offset=self._l1,
            image_size=self.old_size,
        )

    async def restore(self, storage: Storage) -> None:
        """All that was written lies behind the old end."""

    async def finish(self, storage: Storage, progress: Report) -> None:
        """The disk's first bytes behind the header go: programs that look for a file system in any file would find the
        guest's there."""
        await storage.punch(SECTOR_SIZE, self._geometry.cluster_size - SECTOR_SIZE)
