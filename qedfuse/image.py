"""The engine: one QED image, read and written as flat bytes.

Data's way: `write` -> allocator -> storage -> tables -> commit. A request that needs no waiting (its table pages are in
memory, its clusters are allocated, the host has it in the page cache) is done on the spot by the `_nowait` functions,
without a lock: nothing else runs meanwhile. Everything else holds a range lock from looking up to finishing.

The order of writes that makes this safe is not decided here: `commit.py` owns it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from qedfuse.allocator import Allocator
from qedfuse.commit import MAX_DIRTY_PAGES, Committer
from qedfuse.errors import QedfuseError, ReadOnlyError
from qedfuse.geometry import PAGE_BITS, PAGE_ENTRIES, SECTOR_SIZE, UNALLOCATED, ZERO_CLUSTER, Geometry, round_up
from qedfuse.header import Header
from qedfuse.layer import Kind, Layer, Run, read_extents, read_extents_nowait, read_layer, resolve, resolve_nowait
from qedfuse.pages import PagePool
from qedfuse.rangelock import FOREVER, RangeLock
from qedfuse.storage import Buffer, Storage
from qedfuse.tables import Tables

_ENTRY_MASK = PAGE_ENTRIES - 1
#: One step of a long operation: bounds memory, lock time and the group.
_STEP_BYTES = 8 << 20
_STEP_CLUSTERS = 16 * PAGE_ENTRIES
#: Zeroing less than this inside a cluster is a write, more is a punch.
_PUNCH_MIN = 128 << 10
_ZEROES = bytes(1 << 20)

_shared_pool = PagePool()


class Image:
    """A QED image; also a `layer.Layer`. Made by `opening.open_image`, which locks, checks and closes it.

    Offsets and sizes are bytes, any alignment. Errors are OSErrors: what the host said, EROFS on a read-only image, EIO
    for a corrupt table and ever after a failed sync. A cancelled write may have happened in part, as after a crash; the
    image stays consistent.

    `backing` is the layer below, owned and closed with the image. `fixed_size`: writing past the end is ENOSPC and
    resizing EPERM. `pool` bounds the memory for tables (shared by all images of the process by default).
    """

    format = "qed"

    def __init__(
        self,
        storage: Storage,
        header: Header,
        backing: Layer | None,
        *,
        writable: bool,
        fixed_size: bool = False,
        pool: PagePool | None = None,
    ) -> None:
        self.path = storage.path
        self.storage = storage
        self.geometry: Geometry = header.geometry
        self.writable = writable
        self.fixed_size = fixed_size
        self._backing = backing
        self._header = header
        self._size = header.image_size
        self._bits = self.geometry.cluster_bits
        self._mask = self.geometry.cluster_size - 1
        self._tables = Tables(storage, header, pool or _shared_pool, lenient=header.needs_check and not writable)
        self._l2_pages = self._tables.l2.pages
        self._data_start = header.header_bytes
        self._locks = RangeLock()
        self._closed = False
        self._committer: Committer | None = None
        if writable:
            self._allocator = Allocator(self.geometry, storage.stat().st_size)
            self._committer = Committer(storage, header, self._tables, self._allocator, barrier=backing is not None)

    async def start(self) -> None:
        """What must be in the file before the first write: unknown autoclear bits are cleared, durably."""
        if self._committer:
            await self._committer.clear_autoclear()

    async def run_background(self) -> None:
        """Commit on a timer; runs until cancelled. An image without it is safe, but commits only on flush."""
        if self._committer:
            await self._committer.run_background()

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes that the guest sees."""
        return self._size

    @property
    def backing(self) -> Layer | None:
        return self._backing

    @property
    def header(self) -> Header:
        """As in the file, or on its way there."""
        return self._committer.header if self._committer else self._header

    @property
    def failed(self) -> OSError | None:
        """The error of the sync after which the image became read-only."""
        return self._committer.failed if self._committer else None

    # -- reading ------------------------------------------------------------------------------------------------------

    def read_nowait(self, offset: int, size: int) -> bytes | bytearray | None:
        """As `read`, if it can be done on the spot; None if it can't."""
        if offset + size > self._size:
            size = max(0, self._size - offset)
        if (offset ^ (offset + size - 1)) >> self._bits == 0:  # one cluster, the common case
            cluster = offset >> self._bits
            page = self._l2_pages.get(cluster >> PAGE_BITS)
            if page is None:
                return self._read_mapped_nowait(offset, size)
            entry = page[cluster & _ENTRY_MASK]
            if entry > ZERO_CLUSTER and not entry & self._mask and self._data_start <= entry < self._tables.file_end:
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
            size = max(0, min(size, self._size - offset))
            return await read_extents(await resolve(self, offset, size), offset, size) if size else b""

    def map_nowait(self, offset: int, size: int) -> list[Run] | None:
        runs = self._tables.map_prefix(offset, size)
        return runs if sum(run.length for run in runs) == size else None

    async def map(self, offset: int, size: int) -> list[Run]:
        """See `Layer.map`. Source of the entries' meaning: qed_spec, "Data cluster offsets"."""
        while True:
            runs = self._tables.map_prefix(offset, size)
            if runs or not size:
                return runs
            await self._tables.load(offset >> self._bits >> PAGE_BITS)

    async def read_indirect(self, offset: int, size: int) -> bytes:
        raise AssertionError("a qed image has nothing indirect")

    # -- writing ------------------------------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """As `write`, if it overwrites allocated clusters and can be done on the spot. False: not done, use `write`."""
        size = len(data)
        if not size or offset + size > self._size or self._committer is None or self._committer.failed:
            return False
        runs = self._tables.map_prefix(offset, size)
        if len(runs) != 1 or runs[0].kind is not Kind.DATA or runs[0].length != size:
            return False
        self._committer.unsynced = True
        return self.storage.write_nowait(runs[0].host, data)

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`. Past the end, the image grows first (ENOSPC if its size is fixed, EFBIG if
        its geometry cannot map it). Zeroes written over what reads as zeroes anyway allocate nothing."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _STEP_BYTES):
            part = view[start : start + _STEP_BYTES]
            await self._write_step(offset + start, part)

    async def _write_step(self, offset: int, data: memoryview) -> None:
        end = offset + len(data)
        committer = await self._make_room()
        while True:
            if end > self._size:
                if self.fixed_size:
                    raise QedfuseError(self.path, "no space: the image's size is fixed", errno.ENOSPC)
                await self._grow_to(end)
            async with self._locks.hold(*self._clusters(offset, len(data)), exclusive=True):
                if end > self._size:  # somebody shrank it meanwhile
                    continue
                committer.unsynced = True
                position = offset
                for kind, length, host in await self._map_whole(offset, len(data)):
                    part = data[position - offset : position - offset + length]
                    if kind is Kind.DATA:
                        await self.storage.write(host, [part])
                    else:
                        await self._write_unmapped(position, part, kind)
                    position += length
                return

    async def _write_unmapped(self, offset: int, data: memoryview, kind: Kind) -> None:
        """Write into clusters that have no data of their own. The caller holds their lock."""
        if _is_zero(data):
            if kind is Kind.ZERO or not self._below(offset, len(data)):
                return
            if not (offset | len(data)) & self._mask:
                for start, size in self._by_page(offset, len(data)):
                    await self._set_entries(start, size, ZERO_CLUSTER)
                return
        copy = kind is Kind.UNALLOCATED
        done = 0
        while done < len(data):
            position = offset + done
            skip = position & self._mask
            wanted = min(len(data) - done, self._page_room(position))
            host, room = self._allocate(self.geometry.clusters_for(skip + wanted))
            part = data[done : done + min(wanted, room - skip)]
            try:
                await self._committer_or_fail().extend()
                head = await self._copy(position - skip, skip) if skip and copy else b""
                rest = -(skip + len(part)) & self._mask
                tail = await self._copy(position + len(part), rest) if rest and copy else b""
                await self.storage.write(host if head else host + skip, [head, part, tail] if head or tail else [part])
                await self._set_entries(position - skip, room, host)
            except BaseException:
                self._allocator.release(host, room)
                self._committer_or_fail().note_change()
                raise
            done += len(part)

    async def _copy(self, offset: int, size: int) -> bytes | bytearray:
        """What the backing file has around a write, empty if that is all zeroes (the new cluster reads so anyway).

        What the backing file has past the end of the image is none of the guest's business.
        """
        inside = max(0, min(size, self._size - offset))
        if not self._below(offset, inside):
            return b""
        data = await read_layer(self._backing, offset, inside)
        return b"" if _is_zero(memoryview(data)) else bytes(data).ljust(size, b"\0")

    async def zero(self, offset: int, size: int) -> None:
        """Make a range inside the image read as zeroes; whole clusters give their space back."""
        await self._zero(offset, min(size, max(0, self._size - offset)))

    async def discard(self, offset: int, size: int) -> None:
        """Give the clusters that lie wholly inside the range back; they read as zeroes. The edges stay as they are."""
        size = min(size, max(0, self._size - offset))
        end = offset + size
        last = end if end == self._size else self.geometry.start_of_cluster(end)
        first = round_up(offset, self.geometry.cluster_size)
        await self._zero(first, last - first)

    async def _zero(self, offset: int, size: int) -> None:
        end = offset + size
        while offset < end:
            await self._make_room()
            step = min(end, self.geometry.start_of_cluster(offset) + (_STEP_CLUSTERS << self._bits)) - offset
            async with self._locks.hold(*self._clusters(offset, step), exclusive=True):
                step = min(step, self._size - offset)
                if step <= 0:  # somebody shrank it meanwhile
                    return
                offset += await self._zero_step(offset, step)

    async def _zero_step(self, offset: int, size: int) -> int:
        """Zero up to `size` bytes at `offset`; the caller holds their lock. Returns how far it got, at least 1.

        The last cluster of the image counts as whole when the range reaches the image's end.
        """
        kind, length, host = (await self.map(offset, size))[0]
        if kind is Kind.ZERO or (kind is Kind.UNALLOCATED and not self._below(offset, length)):
            return length
        self._committer_or_fail().unsynced = True
        cluster_size = self.geometry.cluster_size
        length = min(length, self._page_room(offset))
        skip = offset & self._mask
        if skip or (length < cluster_size and offset + length < self._size):
            length = min(length, cluster_size - skip)
            if kind is Kind.DATA:
                await self._zero_data(host, length)
            else:
                await self._write_unmapped(offset, memoryview(bytes(length)), kind)
            return length
        if offset + length < self._size:
            length &= -cluster_size
        await self._set_whole(offset, round_up(length, cluster_size), self._zero_entry, kind, host)
        return length

    async def _zero_data(self, host: int, size: int) -> None:
        """Zero part of a cluster in place."""
        if size < _PUNCH_MIN:
            await self.storage.write(host, [memoryview(_ZEROES)[:size]])
        else:
            await self.storage.punch(host, size)

    @property
    def _zero_entry(self) -> int:
        return UNALLOCATED if self._backing is None else ZERO_CLUSTER

    # -- size and durability ------------------------------------------------------------------------------------------

    async def resize(self, size: int) -> None:
        """Set the image's size in bytes, rounded up to 512. What is added reads as zeroes, what is cut off is given
        back. A smaller size is durable on return, a larger one after `flush`. Raises EFBIG past the geometry's maximum.
        """
        size = round_up(size, SECTOR_SIZE)
        committer = await self._make_room()
        if size == self._size:
            return
        if self.fixed_size:
            raise QedfuseError(self.path, "the image's size is fixed", errno.EPERM)
        async with self._locks.hold(0, FOREVER, exclusive=True):
            if size >= self._size:
                await self._grow(size)
            else:
                old, self._size = self._size, size
                try:
                    await committer.shrink(size)
                except OSError:
                    self._size = old
                    raise
                await self._clear(size, old, UNALLOCATED)

    async def _grow_to(self, end: int) -> None:
        """Grow for a write that ends at `end`."""
        async with self._locks.hold(0, FOREVER, exclusive=True):
            if end > self._size:
                await self._grow(round_up(end, SECTOR_SIZE))

    async def _grow(self, size: int) -> None:
        """The caller holds every lock. Tables behind the old end may hold anything: make it read as zeroes first."""
        if size > self.geometry.max_image_size:
            raise QedfuseError(
                self.path,
                f"file too large: this image's geometry maps {self.geometry.max_image_size} bytes",
                errno.EFBIG,
            )
        await self._clear(self._size, size, self._zero_entry)
        self._size = size
        self._committer_or_fail().note_size(size)

    async def _clear(self, offset: int, end: int, entry: int) -> None:
        """Make [offset, end), which is no part of the image now, read as zeroes. The caller holds every lock."""
        committer = await self._make_room()
        skip = offset & self._mask
        if skip:  # the rest of the last cluster, as far as it has data of its own or would show the backing file's
            rest = self.geometry.cluster_size - skip
            run = (await self.map(offset, rest))[0]
            committer.unsynced = True
            if run.kind is Kind.DATA:
                await self._zero_data(run.host, rest)
            elif run.kind is Kind.UNALLOCATED and entry == ZERO_CLUSTER and self._below(offset, rest):
                await self._take_out_of_backing(offset - skip)
            offset += rest
        while offset < end:
            await self._make_room()
            step = min(end - offset, _STEP_CLUSTERS << self._bits)
            kind, length, host = (await self.map(offset, step))[0]
            if (
                kind is Kind.DATA
                or (kind is Kind.ZERO and entry == UNALLOCATED)
                or (kind is Kind.UNALLOCATED and entry == ZERO_CLUSTER and self._below(offset, length))
            ):
                length = round_up(min(length, self._page_room(offset)), self.geometry.cluster_size)
                await self._set_whole(offset, length, entry, kind, host)
            offset += length

    async def _take_out_of_backing(self, start: int) -> None:
        """Give the image's last cluster, which is the backing file's up to the image's end, data of its own."""
        inside = self._size - start
        data = await read_layer(self._backing, start, inside)
        host, room = self._allocate(1)
        try:
            await self._committer_or_fail().extend()
            await self.storage.write(host, [data])
            await self._set_entries(start, room, host)
        except BaseException:
            self._allocator.release(host, room)
            raise

    async def flush(self) -> None:
        """Everything completed before this call is durable when it returns. Nothing to do on a read-only image.

        Raises OSError, EIO ever after a failed sync. Cancelled: the commit is carried out all the same.
        """
        if self._committer:
            await self._committer.flush()

    async def close(self) -> None:
        """Flush, mark clean, trim the file, close it and the layers below. Idempotent.

        The files are closed even when the flush fails; its error is raised then.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._committer and not self._committer.failed:
                await self._committer.close()
        finally:
            self._tables.close()
            await self.storage.close()
            if self._backing:
                await self._backing.close()

    # -- small parts --------------------------------------------------------------------------------------------------

    def _clusters(self, offset: int, size: int) -> tuple[int, int]:
        return offset >> self._bits, (offset + size + self._mask) >> self._bits

    def _below(self, offset: int, size: int) -> bool:
        """Whether the backing file has anything in a range."""
        return self._backing is not None and size > 0 and offset < self._backing.size

    def _committer_or_fail(self) -> Committer:
        if self._committer is None:
            raise ReadOnlyError(self.path, "is open read-only")
        return self._committer

    async def _make_room(self) -> Committer:
        """What every change begins with, before it takes locks: may it be, and is there memory for more dirty pages?"""
        committer = self._committer_or_fail()
        if committer.failed:
            raise QedfuseError(self.path, "an earlier sync failed; the image is read-only now", errno.EIO)
        if self._tables.dirty_pages > MAX_DIRTY_PAGES:
            await committer.write_back()
        return committer

    def _allocate(self, clusters: int) -> tuple[int, int]:
        run = self._allocator.allocate(clusters)
        self._tables.file_end = self._allocator.end
        return run

    async def _map_whole(self, offset: int, size: int) -> list[Run]:
        runs: list[Run] = []
        while size:
            for run in await self.map(offset, size):
                runs.append(run)
                offset += run.length
                size -= run.length
        return runs

    def _page_room(self, offset: int) -> int:
        """Bytes from `offset` to where its L2 page ends. What stays inside one page changes all at once or not at all."""
        page = self._bits + PAGE_BITS
        return ((offset >> page) + 1 << page) - offset

    def _by_page(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """A range cut where L2 pages end."""
        end = offset + size
        while offset < end:
            step = min(end - offset, self._page_room(offset))
            yield offset, step
            offset += step

    async def _set_whole(self, offset: int, size: int, entry: int, kind: Kind, host: int) -> None:
        """Map whole clusters of one run and one L2 page to 0 or 1 and release the data they had."""
        await self._set_entries(offset, size, entry)
        if kind is Kind.DATA:
            self._allocator.release(host, size)

    async def _set_entries(self, offset: int, size: int, entry: int) -> None:
        """Map the clusters of [offset, offset+size), whole and in one L2 page, to `entry` and on, or all to 0 or 1.

        Fails before it changes anything (the page could not be read) or not at all.
        """
        step = self.geometry.cluster_size if entry > ZERO_CLUSTER else 0
        index = offset >> self._bits >> PAGE_BITS
        page = await self._tables.prepare(index, self._allocator)
        first = (offset >> self._bits) & _ENTRY_MASK
        for position in range(first, first + (size >> self._bits)):
            page[position] = entry
            entry += step
        self._tables.changed(index)
        self._committer_or_fail().note_change()


def _is_zero(data: memoryview) -> bool:
    if data[:16].tobytes().strip(b"\0") or data[-16:].tobytes().strip(b"\0"):  # the common case costs no copy
        return False
    return not any(
        data[start : start + len(_ZEROES)].tobytes() != _ZEROES[: len(data) - start]
        for start in range(0, len(data), len(_ZEROES))
    )
