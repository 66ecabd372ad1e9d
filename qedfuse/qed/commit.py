"""Sole owner of the write order: when table pages, the L1 table and the header go to the file, and between which syncs.

The rulebook
============

The engine writes guest data at once and changes tables in memory only. A *commit* takes what has changed up to one
instant (the group: copies of the dirty pages, so that later changes stay out) and brings it to the file:

    - header   after a failed write of the header, which may have happened: the header is written again; sync
    0 extend   the file covers every cluster handed out (truncate). On a block device: before a cluster is handed out,
               it is zeroed; sync
    1 mark     no backing file: NEED_CHECK is set in the header, and synced, if it is not set yet. (`commit_timer.py`
               has it done before that, right after the first change, while there is little to sync.)
    2 new      pages of L2 tables to which the file's L1 table does not refer yet
    3 barrier  backing file: sync
    4 tables   pages of the other L2 tables, pages of the L1 table
    5 sync     if a caller waits for durability, if clusters were lost, if the image size has grown. Before it, clusters
               that were lost before the group was taken are punched; after it, they are free
    6 size     a grown image_size goes to the header; sync

What a crash leaves (power loss: any subset of what was written since the last completed sync, torn at 512 bytes):

    crash in   with a backing file                         without
    0          a longer file: leaked clusters              the same
               a device: zeroes that nothing refers to
    1          -                                           NEED_CHECK on or off; tables unchanged
    2, 3       new tables that nothing refers to: leaks    NEED_CHECK is on. An entry may point at a cluster whose
    4          an entry is old or new; a new one's data    data is missing (it reads as zeroes, as it did before) or
               and a new L1 entry's table are durable      outside the file (the repair drops it: zeroes); an L1
               since 3                                     entry at a table of zeroes or outside: the same
    5          as 4                                        as 4
    6          the old size or the new one (8 aligned bytes); behind the old end all reads as zeroes since 5

Reads of "missing" data as zeroes hold because a cluster handed out reads as zeroes durably (`allocator.py`). Guest data
needs no step of its own: it was written before the group was taken, so the syncs of 3 and 5 cover it.

A process that was killed leaves in the host's page cache what it has written: the next one reads it there and builds on
it. Nobody knows what of it was synced, so the first flush syncs even if nothing was written since.

An entry, once set, stays: what is zeroed or discarded of a cluster is punched in place, which is a write like any
other, and so is what is written there later. (QED has no free list: a cluster without an entry is a leak for ever.) So
no table changes, nothing waits for a commit, and no cluster goes from one place of the guest to another. Two entries
do go away. Where the host cannot punch, the entry becomes 1, or 0 without a backing file, as any entry changes: its
cluster is a leak. And the tail of the file goes when an image was cut short, see below.

An image that is itself below another one may be written when its overlay is committed (`tools/commit.py`), and at no
other time. Whoever reads through the overlay repairs nothing below it. So then the order is that of an image with a
backing file, whether it has one or not: with the barrier, without NEED_CHECK.

A block device has stale bytes everywhere, and any of them could pass for a table or for data. What is free there was
found by reading the tables (`reserve.py`) before any of it was handed out. It is synced once before the first of it is
zeroed: what was read may be younger than what is on the disk, where an entry may still lead to it. Then it is zeroed in
large steps, each followed by a sync, and only then handed out. From there on a device is like a file.

Shrinking goes the other way round: the smaller size is durable before anything behind it is dropped or zeroed. Before
that comes what may lack space: a cluster of its own for the last sector, if the backing file's is to be cut. What is
cut off inside of the last cluster is zeroed in place, then, before the answer. Inside of the last sector, which stays
in the image if the size asked for is no multiple of 512, it reads as before or as zeroes, as after any write.

Then the tail of the file is given up: the clusters at its end, as far as nothing but entries and tables behind the new
end refers to them (`tail.py`); on a device, all that is cut off, wherever it lies. Their entries become 0, and so do
the L1 entries of the tables among them, which leave memory. A commit with sync makes that durable. Only then is the
file cut, which another sync makes durable before a cluster is handed out there again: the bytes are stale. (On a
device, what is free is looked for anew.) Three things make it safe to drop a table:

    - all that it refers to goes with it, or is no cluster of the file.
    - a page of it is not written once its clusters can be another's: all was flushed before, the whole image is
      locked, so that no page of it is pinned or becomes so (changed, in a new table, or in the group of a commit).
    - a page that is being read while its table is dropped does not come into memory (`tables.py`).

A crash leaves each entry old or 0, and the file with or without its tail, but without it only if all of them are 0.
Last, what else is cut off is punched, before the answer, too; it keeps its entries, as anywhere. What a crash has left
of all that is behind the end: growing zeroes it, too, but a QEMU that grows the image would show it.

Replacing the backing file. The caller vouches that the guest reads the same through the new one, or through none. The
whole image is locked, so that nothing changes meanwhile but data in place. Then

    a commit   with sync: every entry and its data are durable, by the old rules, which the old header stands for
    b name     the new name goes to a part of the header's clusters that the old header does not refer to; sync
    c header   features, place and length of the name: the first 64 bytes, in one sector; sync. NEED_CHECK is not set:
               nothing is dirty since a. Without a backing file, step 1 sets it before the next table changes
    d engine   reads go through the new layer; barrier, zero entries and NEED_CHECK follow from header and layer

What a crash leaves: in a, as in any commit; in b, the old header, and bytes that nothing refers to; in c, the old
header or the new one, each with its name. Both read the same, as all that was committed does.

If c fails, the file may have the new header. The old one is written again before anything else, as ever, and may be:
b has spared its name.

NEED_CHECK is cleared after a commit with sync that left nothing dirty: when the image has been idle, and on close.

A failed sync is final: the kernel may have dropped the pages that it could not write, so no later sync can vouch for
them. `failed` holds the error and every later commit raises EIO. A failed *write* of a page (ENOSPC, EIO) is not final:
the pages stay dirty and the next commit writes them again; so does it with the header, before all else, since the file
may say "clean" or have a size that was never acknowledged. From step 4 on a new table counts as referred to, whatever
happens: its L1 entry may be in the file.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import trio

from qedfuse.errors import QedfuseError
from qedfuse.host.storage import Storage
from qedfuse.qed.allocator import Allocator, HostRun
from qedfuse.qed.file_growth import DeviceGrowth, FileGrowth, Growth
from qedfuse.qed.header import FEATURE_NEED_CHECK, Header
from qedfuse.qed.table_pages import PageMap
from qedfuse.qed.tables import Tables
from qedfuse.sizes import GuestOffset, HostOffset

log = logging.getLogger("qedfuse")

#: Dirty pages at which writers commit first: 1 MiB of tables.
MAX_DIRTY_PAGES = 256

_Pages = list[tuple[PageMap, int, int, bytes]]


class _Flush:
    """Callers of `flush` that share one commit: all that came before it began."""

    def __init__(self) -> None:
        self.error: OSError | None = OSError(errno.EIO, "the commit did not end")


class Committer:
    """The write order of one image that is open for writing. See the module's rulebook."""

    def __init__(self, storage: Storage, header: Header, tables: Tables, allocator: Allocator) -> None:
        self.header = header  # as in the file, or on its way there
        self.failed: OSError | None = None
        self.unsynced = True  # something may have been written since the last sync began, also by a killed process
        self._storage = storage
        self._tables = tables
        self._allocator = allocator
        self._unsynced_tables = False
        self._trusted = True
        self._closed = False
        self._header_known = True  # the file's header is `header`: no write of another one has failed
        self.ordered = False  # see `Image.keep_order`
        self.growth: Growth = (
            DeviceGrowth(storage, allocator, self, header)
            if storage.fixed
            else FileGrowth(storage, allocator, self, header.cluster_size)
        )
        self.size = GuestOffset(
            header.image_size
        )  # the guest's; a grown one the header has after the next commit with sync
        self._running = trio.Semaphore(1, max_value=1)  # a lock that belongs to no task
        self._group = _Flush()  # for those that ask from now on
        self.dirty = trio.Event()  # tables have changed since `commit_timer.py` has looked
        self.changes = 0  # counts them
        self.writes = 0  # counts those of guest data and of pages, or bursts of them

    @property
    def _barrier(self) -> bool:
        """Whether data must be durable before an entry leads to it: the file says that it has a backing file, or it is
        written as if it had one."""
        return self.ordered or self.header.has_backing_file

    # -- what the engine tells --------------------------------------------------------------------------------------

    def note_change(self) -> None:
        """Tables changed: they are due for a commit."""
        self.changes += 1
        self.dirty.set()

    def note_written(self) -> None:
        """Guest data was written, or zeroed, in place or into new clusters: the next flush must sync it,
        unless its sync began before this call."""
        self.unsynced = True
        self.writes += 1

    def grow(self, size: GuestOffset) -> None:
        """The image has a larger size; the header follows with the next commit."""
        self.size = size
        self.note_change()

    # -- durability -------------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Everything written and changed before this call is durable when it returns.

        Callers that arrive while a commit runs share the next one. Raises OSError; EIO ever after a failed sync. Once
        its commit has begun it is carried out even if the caller is cancelled.
        """
        self.check()
        if not self.unsynced and not self._dirty and not self._committing:
            return
        group = self._group
        if self._committing:
            await self._running.acquire()
        else:  # as a rule; and without a trip through the event loop
            self._running.acquire_nowait()
        try:
            if group is self._group:  # the first of it that has its turn
                self._group = _Flush()
                with trio.CancelScope(shield=True):
                    try:
                        await self._commit(durable=True)
                        group.error = None
                    except OSError as error:
                        group.error = error
        finally:
            self._running.release()
        if group.error is not None:
            raise OSError(group.error.errno, group.error.strerror, self._storage.path) from group.error

    def begin_flush(self) -> Coroutine[Any, Any, None] | None:
        """`flush` without a task: a coroutine of which each await is one host call (a write, a sync, a punch), to be
        driven to its end by a `stepping.Stepper`, call by call, inline or in a thread.

        None if it would wait for anything else: another commit, or the file to be extended. The answer is valid until
        the next await: its first step must follow at once. It covers what was written before that step, and holds the
        turn to commit until its end. Raises OSError: EIO after a failed sync, EBADF after `close`."""
        self.check()
        if self._committing or not (self._header_known and self.growth.covers()):
            return None
        return self._flush_alone()

    async def _flush_alone(self) -> None:
        self._running.acquire_nowait()  # nothing waits for a turn, so no group has formed
        try:
            if self.unsynced or self._dirty:
                await self._commit(durable=True)
        finally:
            self._running.release()

    @property
    def _committing(self) -> bool:
        return self._running.value == 0

    async def write_back(self) -> None:
        """Bring dirty tables to the file; durable only as far as the order needs it. Raises OSError."""
        self.check()
        async with self._running:
            with trio.CancelScope(shield=True):
                await self._commit(durable=False)

    async def shrink(self, size: GuestOffset) -> None:
        """Make a smaller image size durable, before the engine drops what lies behind it. It holds at once, and not if
        this fails. Raises OSError."""
        old, self.size = self.size, size
        try:
            await self.flush()
            async with self._running:
                self.check()
                with trio.CancelScope(shield=True):
                    await self._write_header(self.header.with_image_size(size))
        except BaseException:
            self.size = old
            raise

    async def replace_backing(self, name: bytes, *, is_raw: bool, replaced: Callable[[], None]) -> None:
        """Refer to another backing file, or to none (an empty `name`), durably: see the rulebook. `replaced` is called
        as soon as the header says so, before any other task has its turn. Raises QedfuseError (ENAMETOOLONG), with
        nothing changed, if the header has no room for the name; OSError. Once its commit has begun it is carried out.
        """
        offset = self.header.room_for_name(len(name), self._storage.path) if name else 0
        self.check()
        async with self._running:
            with trio.CancelScope(shield=True):
                await self._commit(durable=True)
                if name:
                    await self._storage.write(offset, [name])
                    await self._sync()
                header = self.header.with_backing_file(offset, len(name), is_raw=is_raw)
                await self._write_header(header.with_feature(FEATURE_NEED_CHECK, False))
                replaced()
                self.changes += 1

    async def give_up_tail(self, end: HostOffset) -> None:
        """Cut the file at `end`: no entry refers to what lies behind. Raises OSError."""
        await self.flush()
        async with self._running:
            self.check()
            with trio.CancelScope(shield=True):
                await self.growth.give_up(end)
                await self._sync()

    @property
    def crowded(self) -> bool:
        """Whether so much waits for a commit that writers have to see to one first."""
        return self._tables.dirty_pages > MAX_DIRTY_PAGES

    @property
    def _dirty(self) -> bool:
        tables = self._tables
        return bool(
            tables.dirty_l1
            or tables.dirty_l2
            or self._allocator.has_lost
            or self.size > self.header.image_size
            or not self._header_known
        )

    def give_up(self, error: BaseException) -> None:
        """What is in memory can no longer be trusted: nothing of it goes to the file."""
        log.critical("%s: the image is read-only from now on", self._storage.path, exc_info=error)
        self._trusted = False
        self.failed = OSError(errno.EIO, f"internal error: {error}")

    def check(self) -> None:
        """Raise EIO if a sync has failed or after `give_up`, EBADF after `close`."""
        if self.failed:
            reason = f"an earlier sync failed ({self.failed.strerror})" if self._trusted else self.failed.strerror
            raise QedfuseError(self._storage.path, f"{reason}; the image is read-only", errno.EIO)
        if self._closed:
            raise QedfuseError(self._storage.path, "the image is closed", errno.EBADF)

    # -- the commit ---------------------------------------------------------------------------------------------------

    async def _commit(self, durable: bool) -> None:
        self.check()
        tables, allocator = self._tables, self._allocator
        size = self.size
        new_tables = dict(tables.new_tables)
        group = self._take(tables.l2, tables.dirty_l2) + self._take(tables.l1, tables.dirty_l1)
        lost = allocator.take_lost()
        try:
            if not self._header_known:
                await self._write_header(self.header)
            if group:
                await self.growth.extend()
                await self._mark()
                table_bits = tables.geometry.table_page_bits
                new: _Pages = []
                old: _Pages = []
                for item in group:
                    fresh = item[0] is tables.l2 and item[1] >> table_bits in new_tables
                    (new if fresh else old).append(item)
                await self._write_pages(new)
                if self._barrier:
                    await self._sync()
                for table in new_tables:
                    del tables.new_tables[table]
                await self._write_pages(old)
            punched = await self._punch(lost)
            if durable or lost or size > self.header.image_size:
                await self._sync()
            if size > self.header.image_size:
                await self._write_header(self.header.with_image_size(size))
        except BaseException:
            for level, index, _host, _content in group:
                self._dirty_set(level).add(index)
            for run in lost:
                allocator.lose(*run)
            raise
        for level, index, _host, _content in group:
            if index not in self._dirty_set(level):
                level.unpin(index)
        allocator.put_free(punched)

    def _dirty_set(self, level: PageMap) -> set[int]:
        return self._tables.dirty_l1 if level is self._tables.l1 else self._tables.dirty_l2

    @staticmethod
    def _take(level: PageMap, dirty: set[int]) -> _Pages:
        """Copies of a level's dirty pages; they stay pinned until they are written."""
        group = [(level, index, level.hosts[index], bytes(level.pages[index])) for index in dirty]
        dirty.clear()
        return group

    async def _write_pages(self, group: _Pages) -> None:
        """Write pages, those that adjoin in the file with one call."""
        run: list[bytes] = []
        start = end = 0
        for _level, _index, host, content in sorted(group, key=lambda item: item[2]):
            if run and host != end:
                await self._storage.write(start, run)
                run = []
            if not run:
                start = host
            run.append(content)
            end = host + len(content)
            self.unsynced = self._unsynced_tables = True
        if run:
            await self._storage.write(start, run)
        self.writes += 1

    async def _mark(self) -> None:
        """Step 1."""
        if not self._barrier and not self.header.needs_check:
            await self._write_header(self.header.with_feature(FEATURE_NEED_CHECK, True))

    async def _write_header(self, header: Header) -> None:
        self.check()
        self._header_known = False
        await self._storage.write(0, [header.encode()])
        await self._sync()
        self.header = header
        self._header_known = True

    async def _sync(self) -> None:
        self.check()
        self.unsynced = self._unsynced_tables = False
        try:
            await self.sync_alone()
        except OSError:
            raise
        except BaseException:  # it may not have been made at all: the next flush has as much to do as this one
            self.unsynced = self._unsynced_tables = True
            raise

    async def sync_alone(self) -> None:
        """A sync for what the caller has written and for nothing else, while a commit may be running. Raises OSError.

        Before and after, another task's may have failed: the kernel tells that once, to whichever comes first.
        """
        self.check()
        try:
            await self._storage.sync()
        except OSError as error:
            self.failed = error
            log.error("%s: sync failed: %s; the image is read-only from now on", self._storage.path, error.strerror)
            raise
        self.check()

    async def _punch(self, lost: list[HostRun]) -> list[HostRun]:
        """Before step 5. Returns what is a hole then. What cannot be punched stays unused: a leak."""
        punched = []
        for run in lost:
            try:
                self.unsynced = True
                await self._storage.punch(*run)
            except OSError as error:
                log.warning("%s: cannot punch a lost cluster: %s", self._storage.path, error.strerror)
            else:
                punched.append(run)
        return punched

    # -- what is done in time (`commit_timer.py`), and in the end ------------------------------------------------------

    async def mark_early(self) -> None:
        """Step 1, if the next commit will need it."""
        async with self._running:
            self.check()
            if self._tables.dirty_l1 or self._tables.dirty_l2:
                with trio.CancelScope(shield=True):
                    await self._mark()

    @property
    def marked(self) -> bool:
        """Whether NEED_CHECK is set because of step 1."""
        return self.header.needs_check and not self._barrier

    @property
    def ended(self) -> bool:
        """Whether no commit can succeed any more."""
        return self.failed is not None or self._closed

    async def clean(self) -> None:
        """Flush, and clear NEED_CHECK if nothing has become dirty meanwhile. Raises OSError."""
        await self.flush()
        tables = self._tables
        async with self._running:
            self.check()
            if self.header.needs_check and not (tables.dirty_l1 or tables.dirty_l2 or self._unsynced_tables):
                with trio.CancelScope(shield=True):
                    await self._write_header(self.header.with_feature(FEATURE_NEED_CHECK, False))

    async def close(self) -> None:
        """The last commit: durable, clean, and without unused clusters at the end of the file. Raises OSError.

        Whatever comes of it, nothing is committed afterwards: the pages and the file are about to go.
        """
        try:
            await self.flush()
            await self.growth.trim()
            if self.unsynced:
                await self._sync()
            await self.clean()
        finally:
            self._closed = True
