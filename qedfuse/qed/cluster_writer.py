"""What may be done to clusters: write into unmapped ones, zero, drop. The caller holds their range lock.

Knows the tables, the allocator and the file; when a change may happen is `image.py`'s business, when it becomes
durable is `commit.py`'s. A step changes entries of one L2 page at most, at once, after its data has been written: if it
fails, nothing refers to what it allocated.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol

from qedfuse.host.storage import Buffer, Storage
from qedfuse.layers.layer import Layer
from qedfuse.layers.resolve import read_layer
from qedfuse.layers.runs import Kind, Run
from qedfuse.qed.allocator import Allocator, HostRun
from qedfuse.qed.commit import Committer
from qedfuse.qed.geometry import UNALLOCATED, ZERO_CLUSTER
from qedfuse.qed.tables import Tables
from qedfuse.sizes import PAGE_BITS, PAGE_ENTRIES, GuestOffset, HostOffset, PageIndex, TableIndex, round_up

_ENTRY_MASK = PAGE_ENTRIES - 1
#: Zeroing less than this inside a cluster is a write, more is a punch, which deallocates.
_PUNCH_MIN = 16 << 10
_ZEROES = bytes(1 << 20)
#: So many holes are made at a time.
_MAX_PUNCHES = 256
#: So many bytes, written at once into new clusters, are a part of more to come.
_BEHIND_MIN = 512 << 10


class Overlay(Protocol):
    """What lies below an image; see `Image.backing`."""

    @property
    def backing(self) -> Layer | None: ...


class ClusterWriter:
    """Changes to the clusters of one image that is open for writing. Offsets and sizes are bytes of the guest, `host`
    those of the file. `image_end`, where a function takes it, is the image's size: what the backing file has past it
    is none of the guest's business. Every function raises OSError and leaves the image consistent when cancelled.
    """

    def __init__(
        self, storage: Storage, tables: Tables, allocator: Allocator, committer: Committer, image: Overlay
    ) -> None:
        self._storage = storage
        self._tables = tables
        self._allocator = allocator
        self._committer = committer
        self._image = image
        self._cluster_size = tables.geometry.cluster_size
        self._bits = tables.geometry.cluster_bits
        self._mask = self._cluster_size - 1
        #: Whether `write` allocates clusters for zeroes, too, as for other data. (`zero` is the same either way.)
        #: Set once, by `Image.keep_zeroes`; valid for each `write` that begins from then on, until the image is closed.
        self.keep_zeroes = False

    @property
    def _zero_entry(self) -> int:
        """The entry of a cluster that reads as zeroes, and has no data."""
        return UNALLOCATED if self._image.backing is None else ZERO_CLUSTER

    async def write(self, offset: GuestOffset, data: memoryview, image_end: GuestOffset) -> None:
        """Write `data`, in place where clusters have data of their own, else into new ones."""
        while len(data):
            for kind, length, host in await self._tables.map(offset, len(data)):
                part, data = data[:length], data[length:]
                if kind is Kind.DATA:
                    await self._put(host, [part])
                else:
                    await self._write_unmapped(offset, part, kind, image_end)
                offset += length

    async def _write_unmapped(self, offset: GuestOffset, data: memoryview, kind: Kind, image_end: GuestOffset) -> None:
        if not self.keep_zeroes and _is_zero(data):
            if kind is Kind.ZERO or not self._below(offset, len(data)):
                return
            if not (offset | len(data)) & self._mask:
                for start, size in self._by_page(offset, len(data)):
                    await self._set_entries(start, size, ZERO_CLUSTER)
                return
        while len(data):
            skip = offset & self._mask
            wanted = min(len(data), self._page_room(offset))
            host, room = await self._allocate(self._tables.geometry.clusters_for(skip + wanted))
            part = data[: min(wanted, room - skip)]
            head: Buffer = b""
            tail: Buffer = b""
            try:
                if kind is Kind.UNALLOCATED:
                    head = await self._copy(offset - skip, skip, image_end)
                    tail = await self._copy(offset + len(part), -(skip + len(part)) & self._mask, image_end)
            except BaseException:
                self._take_back(host, room)
                raise
            try:
                await self._put(host if head else host + skip, [head, part, tail] if head or tail else [part])
                await self._set_entries(offset - skip, room, host)
            except BaseException:
                self.lose(host, room)
                raise
            self._write_behind(host, room, len(part))
            offset += len(part)
            data = data[len(part) :]

    async def _copy(self, offset: GuestOffset, size: int, image_end: GuestOffset) -> Buffer:
        """What the backing file has around a write, empty if that is all zeroes: the new cluster reads so anyway."""
        inside = max(0, min(size, image_end - offset))
        if not self._below(offset, inside):
            return b""
        data = await read_layer(self._image.backing, offset, inside)
        return b"" if _is_zero(memoryview(data)) else data

    async def zero(self, offset: GuestOffset, size: int, image_end: GuestOffset) -> int:
        """Zero up to `size` bytes at `offset`. Returns how far it got, at least 1.

        Clusters that have data keep their place in the file, which becomes a hole. The last cluster of the image counts
        as whole when the range reaches its end.
        """
        runs = await self._tables.map(offset, size)
        kind, length, host = runs[0]
        skip = offset & self._mask
        rest = self._cluster_size - skip
        part = skip or (length < rest and offset + length < image_end)
        if kind is Kind.DATA and part:
            length = min(length, rest)
            await self._zero_part(host, length)
            return length
        data, end = await self._whole_data(offset, size, runs, image_end)
        if end > offset and (not data or await self.punch(data)):
            return min(end, image_end) - offset
        if kind is not Kind.DATA and end > offset:
            return length
        length = min(length, self._page_room(offset))
        if part:
            length = min(length, rest)
            await self._write_unmapped(offset, memoryview(bytes(length)), kind, image_end)
            return length
        if offset + length < image_end:
            length &= -self._cluster_size
        await self._set_entries(offset, round_up(length, self._cluster_size), self._zero_entry)
        return length

    async def _whole_data(
        self, offset: GuestOffset, size: int, runs: Sequence[Run], image_end: GuestOffset
    ) -> tuple[list[HostRun], int]:
        """Where in the file the clusters lie that have data, from `offset` on, of which `runs` is the map; and up to
        where there is nothing but these and what reads as zeroes, as far as is handled at a time."""
        found: list[HostRun] = []
        end = offset + size
        while True:
            for kind, length, host in runs:
                if kind is Kind.DATA:
                    length = length if offset + length < image_end else round_up(length, self._cluster_size)
                    whole = length & ~self._mask
                    if found and sum(found[-1]) == host:
                        found[-1] = found[-1][0], found[-1][1] + whole
                    elif whole:
                        found.append((host, whole))
                    offset += whole
                    if whole < length:
                        return found, offset
                elif kind is Kind.ZERO or not self._below(offset, length):
                    offset += length
                else:
                    return found, offset
            if offset >= end or len(found) >= _MAX_PUNCHES or kind is not Kind.DATA:
                return found, offset
            runs = await self._tables.map(offset, end - offset)

    async def punch(self, runs: Sequence[HostRun]) -> bool:
        """Make holes of the file's runs (offset, size). False: the host can't, and some may be as they were."""
        try:
            return await self._storage.deallocate(runs)
        finally:
            self._committer.note_written()

    async def unmap(self, offset: GuestOffset, size: int) -> None:
        """Set the entries of whole clusters, which have a table, to 0."""
        for start, length in self._by_page(offset, size):
            await self._set_entries(start, length, UNALLOCATED)

    async def drop_table(self, l1_index: TableIndex) -> None:
        """Take away an L2 table behind the image's end, of which nothing waits to be written (`Tables.settled`)."""
        if await self._tables.table(l1_index):
            self._tables.drop_table(l1_index)
            self._committer.note_change()

    async def clear_tail(self, image_end: GuestOffset, *, growing: bool) -> None:
        """Make the rest of the image's last cluster, past its end, read as zeroes: what it holds goes, and if the image
        is `growing`, what the backing file has there does not show. (QEMU grows no image that is shorter than its
        backing file.)"""
        skip = image_end & self._mask
        if not skip:
            return
        rest = self._cluster_size - skip
        kind, _length, host = (await self._tables.map(image_end, rest))[0]
        if kind is Kind.DATA:
            await self._zero_part(host, rest)
        elif growing and kind is Kind.UNALLOCATED and self._below(image_end, rest):
            await self._own(image_end - skip, skip)

    async def own(self, offset: GuestOffset, image_end: GuestOffset) -> None:
        """Give the cluster at `offset` data of its own, if what the backing file has there is to be changed: what
        takes space is done then. It reads as before."""
        kind, _length, _host = (await self._tables.map(offset, 1))[0]
        start = offset & -self._cluster_size
        if kind is Kind.UNALLOCATED and self._below(offset, 1):
            await self._own(start, min(self._cluster_size, image_end - start))

    async def _own(self, start: GuestOffset, size: int) -> None:
        """Give the cluster at `start` data of its own: the first `size` bytes that the backing file has there."""
        data = await read_layer(self._image.backing, start, size)
        host, room = await self._allocate(1)
        try:
            await self._put(host, [data])
            await self._set_entries(start, room, host)
        except BaseException:
            self.lose(host, room)
            raise

    async def copy_up(self, offset: GuestOffset, size: int, image_end: GuestOffset, *, zeroes: bool) -> None:
        """Give the clusters from `offset` on that are unallocated what they read as, for their own; see
        `Image.copy_up`. `offset` is a cluster's, and so is the end of the range, or it is the image's."""
        while size:
            for kind, length, _host in await self._tables.map(offset, size):
                if kind is Kind.UNALLOCATED:
                    await self._copy_up(offset, length, image_end, zeroes)
                offset += length
                size -= length

    async def _copy_up(self, offset: GuestOffset, size: int, image_end: GuestOffset, zeroes: bool) -> None:
        data = memoryview(await read_layer(self._image.backing, offset, size))
        starts = range(0, size, self._cluster_size)
        for is_zero, group in groupby(starts, lambda start: _is_zero(data[start : start + self._cluster_size])):
            clusters = list(group)
            first, end = clusters[0], clusters[-1] + self._cluster_size
            if not is_zero:  # whole clusters: nothing is to be copied around them, as over zeroes
                await self._write_unmapped(offset + first, data[first:end], Kind.ZERO, image_end)
            elif zeroes:
                for start, length in self._by_page(offset + first, end - first):
                    await self._set_entries(start, length, ZERO_CLUSTER)

    # -- for the fast path --------------------------------------------------------------------------------------------

    def offer(self) -> tuple[HostOffset, HostOffset]:
        """Start and end of clusters that C may take, from the front, without a call: bytes of the file, multiples of
        the cluster size; equal if there are none. They read as zeroes, durably, and the file covers them.

        Valid until anything is allocated or freed here, that is until the next await or `take_offered`."""
        return self._allocator.next_free(self._committer.growth.file_size)

    def take_offered(self, offset: HostOffset, size: int, lost: int, filled: int, pages: Sequence[PageIndex]) -> None:
        """`size` bytes from the front of the offer were taken. See `NativeView.note_taken`."""
        self._allocator.take(offset, size)
        for index in pages:
            if index not in self._tables.l2.pages:
                raise AssertionError(f"l2 page {index} was changed, but is not in memory")
            self._tables.changed(index)
        if lost:
            self._allocator.lose(offset + size - lost, lost)
        self._committer.note_change()
        self._write_behind(offset, size, filled)

    def unused(self) -> tuple[int, int]:
        """Bytes that are free, and that are lost; see `Allocator`."""
        return self._allocator.free, self._allocator.lost

    # -- small parts --------------------------------------------------------------------------------------------------

    async def _put(self, host: HostOffset, buffers: Sequence[Buffer]) -> None:
        """Write guest data. The next flush must sync it, unless its sync begins before this ends: so note it after."""
        try:
            await self._storage.write(host, buffers)
        finally:
            self._committer.note_written()

    def _write_behind(self, host: HostOffset, size: int, filled: int) -> None:
        """Let the disk begin with new clusters of a large write: otherwise it idles until the flush, which waits."""
        if filled >= max(_BEHIND_MIN, size // 2):
            self._storage.write_behind(host, size)

    async def _zero_part(self, host: HostOffset, size: int) -> None:
        """Zero part of a cluster in place."""
        if size < _PUNCH_MIN:
            try:
                return await self._put(host, [memoryview(_ZEROES)[:size]])
            except OSError as error:  # a hole of a full file system takes no zeroes, and needs none
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
        try:
            await self._storage.punch(host, size)
        finally:
            self._committer.note_written()

    def _below(self, offset: GuestOffset, size: int) -> bool:
        """Whether the backing file has anything in a range."""
        backing = self._image.backing
        return backing is not None and size > 0 and offset < backing.size

    async def _allocate(self, clusters: int) -> HostRun:
        """(offset, bytes) of new clusters that the file covers, at most `clusters`. Raises OSError."""
        while self._storage.fixed and not self._allocator.has_free(self._cluster_size):
            await self._committer.growth.extend(self._cluster_size)
        run = self._allocator.allocate(clusters)
        try:
            await self._committer.growth.extend()
        except BaseException:  # nothing was handed out, or every later commit would fail to cover it, too
            self._take_back(*run)
            raise
        return run

    def _take_back(self, host: HostOffset, size: int) -> None:
        """New clusters to which nothing was written."""
        self._allocator.take_back(host, size)

    def lose(self, host: HostOffset, size: int) -> None:
        """New clusters to which something was written, and to which no entry refers."""
        self._allocator.lose(host, size)
        self._committer.note_change()

    def _page_room(self, offset: GuestOffset) -> int:
        """Bytes from `offset` to where its L2 page ends."""
        page = self._bits + PAGE_BITS
        return ((offset >> page) + 1 << page) - offset

    def _by_page(self, offset: GuestOffset, size: int) -> Iterator[tuple[GuestOffset, int]]:
        """A range cut where L2 pages end."""
        end = offset + size
        while offset < end:
            step = min(end - offset, self._page_room(offset))
            yield offset, step
            offset += step

    async def _set_entries(self, offset: GuestOffset, size: int, entry: int) -> None:
        """Map the clusters of [offset, offset+size), whole and in one L2 page, to `entry` and on, or all to 0 or 1.

        Fails before it changes anything (the page could not be read) or not at all.
        """
        step = self._cluster_size if entry > ZERO_CLUSTER else 0
        index = offset >> self._bits >> PAGE_BITS
        await self._tables.load(index)
        table_bytes = self._tables.geometry.table_bytes
        while not (self._tables.has_table(index) or self._committer.growth.covers(table_bytes)):
            await self._committer.growth.extend(table_bytes)
        page = await self._tables.prepare(index, self._allocator)
        first = (offset >> self._bits) & _ENTRY_MASK
        for position in range(first, first + (size >> self._bits)):
            page[position] = entry
            entry += step
        self._tables.changed(index)
        self._committer.note_change()


def _is_zero(data: memoryview) -> bool:
    if data[:16].tobytes().strip(b"\0") or data[-16:].tobytes().strip(b"\0"):  # the common case costs no copy
        return False
    return not any(
        data[start : start + len(_ZEROES)].tobytes() != _ZEROES[: len(data) - start]
        for start in range(0, len(data), len(_ZEROES))
    )
