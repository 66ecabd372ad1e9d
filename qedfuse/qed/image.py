"""The engine: one QED image, read and written as flat bytes. How it is read is in `layer.py`.

Data's way: `write` -> clusters -> allocator -> storage -> tables -> commit. A request that needs no waiting (its table
pages are in memory, its clusters are allocated, the host has it in the page cache) is done inline by the `_nowait`
functions, without a lock: nothing else runs meanwhile. Everything else holds a range lock from looking up to finishing.

The order of writes that makes this safe is not decided here: `commit.py` owns it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from qedfuse.errors import QedfuseError, ReadOnlyError
from qedfuse.host.storage import Buffer, Storage
from qedfuse.host.waiting import Breather
from qedfuse.layers.disk import Disk
from qedfuse.layers.extents import HostExtents
from qedfuse.layers.layer import Layer
from qedfuse.layers.runs import Kind
from qedfuse.qed.allocator import Allocator
from qedfuse.qed.cluster_writer import ClusterWriter
from qedfuse.qed.commit import Committer
from qedfuse.qed.commit_timer import commit_in_time
from qedfuse.qed.header import Header
from qedfuse.qed.layer import QedLayer
from qedfuse.qed.range_lock import FOREVER
from qedfuse.qed.resize import Resizer
from qedfuse.qed.table_pages import PagePool
from qedfuse.sizes import PAGE_ENTRIES, SECTOR_SIZE, GuestOffset, round_up

#: One step of a long operation: bounds memory, lock time and the group.
_STEP_BYTES = 8 << 20
_STEP_CLUSTERS = 16 * PAGE_ENTRIES


class Stats(NamedTuple):
    """Of one image: how many pages of its tables are in memory, and dirty; how many tables the file's L1 table does not
    refer to yet; where clusters end in the file, how much of it before that is free, and how much will be after a
    commit (bytes)."""

    pages: int
    dirty_pages: int
    new_tables: int
    file_end_bytes: int
    free_bytes: int
    lost_bytes: int


class Image(QedLayer):
    """A QED image: a `Disk` and a `Layer`. Made by `opening.open_image`, which locks, checks and closes it.

    Offsets and sizes are bytes, any alignment, and not checked; no call need be a checkpoint. `library.Image` is what
    other programs see. Errors are OSErrors: what the host said, EROFS on a read-only image, EIO
    for a corrupt table and ever after a failed sync. A cancelled write may have happened in part, as after a crash; the
    image stays consistent.

    `backing` is the layer below, owned and closed with the image; None if the header names none. `fixed_size`: writing
    past the end is ENOSPC and resizing EPERM. `pool` bounds the memory for tables (by default shared by all images of
    the thread).
    """

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
        lenient = header.needs_check and not writable and backing is None
        super().__init__(storage, header, backing, lenient=lenient, pool=pool)
        self.writable = writable
        self.fixed_size = fixed_size
        self._closed = False
        self._committer: Committer | None = None
        self._writing = trio.Event()
        self._timer = trio.CancelScope()
        if writable:
            self._begin_writing()

    def _begin_writing(self) -> None:
        storage, tables = self.storage, self._tables
        allocator = Allocator(self.geometry, storage.size(), fixed=storage.fixed)
        tables.begin_writing(allocator)
        self._committer = Committer(storage, self._header, tables, allocator)
        self._writer = ClusterWriter(storage, tables, allocator, self._committer, self)
        self._resizer = Resizer(storage, tables, self._committer, self._begin_change)
        self.writable = True
        self._writing.set()

    async def run_background(self) -> None:
        """Commit on a timer; runs until the image is closed. One without it is safe, but commits only on flush."""
        with self._timer:
            await self._writing.wait()
            assert self._committer is not None
            await commit_in_time(self._committer, self.path)

    async def begin_writing(self, header: Header, exchange: Callable[[], None]) -> None:
        """From an image that is open for reading to one that is open for writing, for every task that uses it.

        `exchange` makes its storage writable. `header` is in the file now, which is consistent, and as this image's is
        but for its features. Raises what `exchange` raises; the image is then as it was.
        """
        assert not self.writable
        async with self._locks.hold(0, FOREVER, exclusive=True):  # no read is half done
            exchange()
            self._header = header
            self._begin_writing()

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def size(self) -> GuestOffset:
        """Bytes that the guest sees."""
        return self._committer.size if self._committer else GuestOffset(self._header.image_size)

    @property
    def header(self) -> Header:
        """As in the file, or on its way there."""
        return self._committer.header if self._committer else self._header

    @property
    def failed(self) -> OSError | None:
        """The error of the sync after which the image became read-only."""
        return self._committer.failed if self._committer else None

    @property
    def room(self) -> int | None:
        """Bytes that new clusters can take on a block device, at most; None: the host's file system knows."""
        if self._committer:
            return self._committer.growth.room
        return 0 if self.storage.fixed else None

    async def measure_room(self) -> int | None:
        """As `room`, exactly: reads all tables, the first time. Raises OSError."""
        if self._committer:
            await self._committer.growth.measure()
        return self.room

    @property
    def version(self) -> tuple[int, int, int]:
        """Another one whenever what is a hole, or the size, may have changed. A write in place may fill a hole, of a
        table, too."""
        committer = self._committer
        return (committer.changes, committer.writes, committer.size) if committer else super().version

    # -- its parts, for `native_view.py` ------------------------------------------------------------------------------

    @property
    def committer(self) -> Committer | None:
        """None until the image is open for writing."""
        return self._committer

    @property
    def clusters(self) -> ClusterWriter:
        """Of an image that is open for writing."""
        return self._writer

    # -- writing ------------------------------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """As `write`, if it overwrites allocated clusters and can be done inline. False: not done, use `write`."""
        size, committer = len(data), self._committer
        if not size or committer is None or offset + size > committer.size or committer.failed:
            return False
        runs = self._tables.map_prefix(GuestOffset(offset), size)
        if len(runs) != 1 or runs[0].kind is not Kind.DATA or runs[0].length != size:
            return False
        committer.note_written()
        return self.storage.write_nowait(runs[0].host, data)

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`. Past the end, the image grows first (ENOSPC if its size is fixed, EFBIG if
        its geometry cannot map it). Zeroes written over what reads as zeroes anyway allocate nothing."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _STEP_BYTES):
            await self._write_step(offset + start, view[start : start + _STEP_BYTES])

    async def _write_step(self, offset: int, data: memoryview) -> None:
        clusters = await self._begin_change()
        end = offset + len(data)
        while True:
            if end > self.size:
                if self.fixed_size:
                    raise QedfuseError(self.path, "no space: the image's size is fixed", errno.ENOSPC)
                async with self._locks.hold(0, FOREVER, exclusive=True):
                    if end > self.size:
                        await self._resizer.grow(GuestOffset(round_up(end, SECTOR_SIZE)))
            async with self._locks.hold(*self._clusters(offset, len(data)), exclusive=True):
                if end <= self.size:  # it has not shrunk meanwhile
                    return await clusters.write(GuestOffset(offset), data, self.size)

    def keep_zeroes(self) -> None:
        """Let `write` allocate clusters for zeroes as for other data, so that an image can be allocated in full.

        Holds for every `write` that begins after this call, until the image is closed. Zeroes that were written before
        stay unallocated; `zero` and `discard` are as before. Raises ReadOnlyError, with nothing changed."""
        self._committer_of()
        self._writer.keep_zeroes = True

    async def zero(self, offset: int, size: int) -> None:
        """Make a range read as zeroes, as far as it lies inside the image; whole clusters are deallocated."""
        end = min(offset + size, self.size)
        most = max(_STEP_CLUSTERS << self._bits, self.geometry.l2_coverage)  # exabytes without tables take no time
        breathe = Breather()
        extents, version = HostExtents(self.storage), self.version
        while offset < end:
            await breathe()
            clusters = await self._begin_change()
            step = min(end, self.geometry.start_of_cluster(offset) + most) - offset
            async with self._locks.hold(*self._clusters(offset, step), exclusive=True):
                step = min(step, self.size - offset)
                if step <= 0:  # it has shrunk meanwhile
                    return
                if version != self.version:
                    extents, version = HostExtents(self.storage), self.version
                blank = 0 if self._backing else await self._tables.measure_blank(GuestOffset(offset), step, extents)
                if not blank or version != self.version:  # a page may have been written since, and left memory
                    blank = await clusters.zero(GuestOffset(offset), step, self.size)
                offset += blank

    async def discard(self, offset: int, size: int) -> None:
        """Deallocate the clusters that lie wholly inside the range; they read as zeroes. The edges stay as they are."""
        end = min(offset + size, self.size)
        last = end if end == self.size else self.geometry.start_of_cluster(end)
        first = round_up(offset, self.geometry.cluster_size)
        await self.zero(first, last - first)

    async def copy_up(self, offset: int, size: int, *, zeroes: bool) -> None:
        """Make what the clusters of a range show of the layer below the image's own, so that they read the same over
        any other: a cluster of data gets a copy, with `zeroes` one of zeroes an entry that says so. What the image has
        itself stays. Raises OSError. Cancelled, or failed, it reads as before, and a part may be its own."""
        end = min(offset + size, self.size)
        start = self.geometry.start_of_cluster(offset) if offset < end else end
        most = round_up(_STEP_BYTES, self.geometry.cluster_size)
        while start < end:
            clusters = await self._begin_change()
            step = min(round_up(end, self.geometry.cluster_size) - start, most)
            async with self._locks.hold(*self._clusters(start, step), exclusive=True):
                inside = min(step, self.size - start)
                if inside <= 0:  # it has shrunk meanwhile
                    return
                await clusters.copy_up(GuestOffset(start), inside, self.size, zeroes=zeroes)
            start += step

    def keep_order(self) -> None:
        """Let data be durable before an entry leads to it, as over a backing file. An image that is itself below
        another one, whose readers repair nothing, is written so. Holds for every commit that begins after this call,
        until the image is closed. Raises ReadOnlyError."""
        self._committer_of().ordered = True

    # -- size and durability ------------------------------------------------------------------------------------------

    async def resize(self, size: int) -> None:
        """Set the image's size in bytes, rounded up to 512. What is added reads as zeroes. What is cut off is gone, up
        to the byte: should the image grow again, it reads as zeroes, in QEMU, too. A smaller size is durable on return,
        a larger one after `flush`. Raises EFBIG past the geometry's maximum, EPERM if the size is fixed.
        """
        await self._begin_change()
        if size == self.size:
            return
        if self.fixed_size:
            raise QedfuseError(self.path, "the image's size is fixed", errno.EPERM)
        async with self._locks.hold(0, FOREVER, exclusive=True):
            if size < self.size:
                await self._resizer.shrink(GuestOffset(size))
            elif size > self.size:
                await self._resizer.grow(GuestOffset(round_up(size, SECTOR_SIZE)))

    async def set_backing(self, layer: Layer | None, name: str = "") -> Layer | None:
        """Put `layer`, which other programs find by `name` (relative to the image's directory), below the image in the
        place of what is there; None and no name: nothing. Durable on return; other calls go on meanwhile.

        The caller vouches that the guest reads the same through the new layer as it does now, for all that the image
        itself has not, and that nothing reads past this object, as the fast path does: of an image that is mounted, the
        slot is quiesced. The image owns and closes `layer` from then on. Returns the layer that was below, which is the
        caller's: the new one may have a part of its chain.

        Raises QedfuseError (ENAMETOOLONG), ReadOnlyError and ValueError before anything is changed; OSError: the image
        reads through the old layer then, and `layer` stays the caller's. Cancelled: `backing` tells whether it has
        happened.
        """
        committer = self._committer_of()
        raw = os.fsencode(name)
        if (layer is None) is not (not raw) or b"\0" in raw:
            raise ValueError("a layer and its name belong together")

        def replaced() -> None:
            self._backing = layer

        async with self._locks.hold(0, FOREVER, exclusive=True):  # nothing is being read through the old layer
            old = self._backing
            is_raw = layer is not None and layer.format == "raw"
            await committer.replace_backing(raw, is_raw=is_raw, replaced=replaced)
        return old

    async def flush(self) -> None:
        """Everything completed before this call is durable when it returns. Of a read-only image: what others have
        written, a process that was killed, say.

        Raises OSError, EIO ever after a failed sync. Cancelled: the commit is carried out all the same.
        """
        if self._committer:
            await self._committer.flush()
        else:
            await self.storage.sync()

    def begin_flush(self) -> Coroutine[Any, Any, None] | None:
        """See `Committer.begin_flush`."""
        return self._committer.begin_flush() if self._committer else self.storage.sync()

    async def write_back(self) -> None:
        """Bring dirty tables to the file, as the timer does; durable only as far as the order needs it. Raises
        OSError."""
        if self._committer:
            await self._committer.write_back()

    def stats(self) -> Stats:
        """What is in memory and waits, as of now."""
        free = lost = 0
        if self._committer:
            free, lost = self._writer.unused()
        tables = self._tables
        return Stats(
            len(tables.l1.pages) + len(tables.l2.pages),
            tables.dirty_pages,
            len(tables.new_tables),
            tables.ends.end,
            free,
            lost,
        )

    async def clean(self) -> None:
        """Flush, and mark the image as one that was closed in good order. Raises OSError as `flush` does.

        After that, closing has nothing left to lose.
        """
        if self._committer:
            await self._committer.clean()

    async def close(self) -> None:
        """Flush, mark clean, trim the file, close it and the layers below, and end the timer. Idempotent.

        The files are closed even when the flush fails; its error is raised then, and EIO if a sync had failed before.
        What could not be written is lost: to be able to try again (ENOSPC), call `clean` first.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._committer:
                await self._committer.close()
        finally:
            self._timer.cancel()  # not before: closing needs the outcome of a commit that it may have begun
            await super().close()

    # -- small parts --------------------------------------------------------------------------------------------------

    def _committer_of(self) -> Committer:
        if self._committer is None:
            raise ReadOnlyError(self.path, "is open read-only")
        return self._committer

    async def _begin_change(self) -> ClusterWriter:
        """What every change begins with: may it be, and is there memory for more dirty pages?"""
        committer = self._committer_of()
        committer.check()
        if committer.crowded:
            await committer.write_back()
        return self._writer


if TYPE_CHECKING:

    def _is_a_disk_and_a_layer(image: Image) -> tuple[Disk, Layer]:
        return image, image
