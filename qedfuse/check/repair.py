"""Crash-safe repair: how the tables are put in order and space goes back to the host.

The rulebook
============

    1 autoclear   unknown autoclear bits are cleared; sync
      extend      after a crash: the file grows, so that what it cuts off keeps what is there; sync
    2 fence       if the file must grow: entries that point where it is going to grow become misaligned; sync. (Not in
                  a table that is going to be copied: its place may be other data.) A block device does not grow:
                  what lies behind the last cluster that is referred to becomes zeroes; sync
    3 copies      the file grows, and what is referenced a second time is copied to its end (on a device, to where the
                  zeroes are); sync
    4 entries     the second reference gets its copy; entries that are invalid become 0, and so do those past the
                  image's end, which are no fault: nothing reads them, so what is wrong with some needs no copy; sync
    5 verify      the whole check again, on the repaired tables. Anything wrong: stop here
    6 release     sync; unreferenced clusters at the end are cut off, those in the middle filled with what is last in
                  the file (6a to 6c for a batch of moves, until there are none), or, on the way to an open image,
                  which should not take long, only punched; sync (a device keeps both)
      6a copies   clusters and tables are copied to where nothing refers to; sync
      6b entries  every entry that refers to one of them gets the new place, in a table that has moved at the table's
                  new place, and last the header, if the L1 table has moved; sync
      6c cut      only now the old places are free: the file is cut behind its last cluster in use (if the host is full,
                  they are punched first)
    7 clean       NEED_CHECK is cleared; sync

What is done twice keeps its place the first time it is met, in the order of the L1 table: the L1 table itself, then for
each L1 entry its L2 table, then what the table refers to. A later reference gets a copy: a data cluster is copied; an
L2 table is copied, and then each of its data clusters is a second reference, too, and is copied by the same rule. So
all that could be read before reads the same afterwards. An invalid entry becomes 0, as QEMU makes it: that exposes the
backing file, or zeroes without one.

What a crash leaves (any subset of what was written since the last completed sync):

    crash in   the image
    1          the old header or the new one (one sector)
    extend     the old size or the new one
    2          an entry that was invalid is so in another way
    3          a longer file; nothing points behind its old end (2), so the new part is leaked clusters. (But for an
               invalid entry of a table that overlaps something: it may see a cluster of zeroes or a copy.)
    4          each entry (8 aligned bytes) is old or new. The new one's copy is durable (3), the old one's cluster is
               untouched: fewer double references, some leaked copies
    5, 6       the tables are durable (sync of 4 or 6, also when the file came with changes that were not): only what
               nothing refers to goes, or is written over
    6a         a longer file, leaked clusters with another content
    6b         each entry, and the header (one sector), is old or new. The new place is durable (6a), nothing is written
               to the old one: both hold the same. Only of a table that moved the new place may have newer entries
    6c         a longer file: nothing refers to its end (sync of 6b)
    7          NEED_CHECK on or off; the tables are durable and in order

In every case a second repair finishes the work. In 6 no entry becomes 0 and no two refer to the same at any time: it
needs neither NEED_CHECK nor care for a backing file. What step 3 copies may be at most as much as the file really
holds, or 1 GiB if that is more, so that a hostile image cannot blow itself up; that is known, and refused, before
anything is written.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable
from contextlib import suppress

from qedfuse.errors import CorruptError
from qedfuse.host.chunks import TableChunks, entry_at, pack_entry, unpack_entries, write_changes
from qedfuse.host.storage import Storage, held_bytes
from qedfuse.host.waiting import Breather
from qedfuse.progress import Report
from qedfuse.qed.cluster_map import ClusterMap
from qedfuse.qed.geometry import ZERO_CLUSTER
from qedfuse.qed.header import Header
from qedfuse.qed.table_walk import Bounds, L1Entries
from qedfuse.sizes import ENTRY_SIZE, PAGE_SIZE

MIN_COPY_LIMIT = 1 << 30
#: Each copy is remembered in 16 bytes until its entry is written.
MAX_COPIES = 4 << 20

#: What an entry becomes, of its value and the size (bytes) of what it refers to.
Fate = Callable[[int, int], int]


#: Added to an offset by step 2: no cluster is aligned to less than 4 KiB.
_FENCE = 0xFED


async def extend(storage: Storage, size: int) -> None:
    """Let the file have `size` bytes, durably. What is added reads as zeroes."""
    await storage.truncate(size)
    await storage.sync()


async def repair_tables(storage: Storage, header: Header, *, overlaps: bool, progress: Report | None = None) -> None:
    """Steps 2 to 4. `overlaps`: something is referenced twice. `progress` as for `check.check_image`.

    Raises OSError; CorruptError, with nothing changed, if too much would have to be copied. Cancellation is harmless.
    """
    bounds = Bounds.of(header, storage.size())
    work = _TableRepair(storage, bounds, progress or _silent)
    if overlaps:
        await work.plan()
        await work.fence()
        try:
            await work.copy()
        except OSError:
            if not storage.fixed:
                with suppress(OSError):
                    await storage.truncate(bounds.end)
            raise
    await work.fix_entries()
    await storage.sync()


def _silent(_done: int, _total: int) -> None:
    pass


class _TableRepair:
    """One repair.

    `_tables`: L1 entries whose L2 table gets a copy, and where it goes. `_slots`, `_targets`: file offsets of entries
    in the other L2 tables whose cluster gets a copy, in the order of the walk, and where it goes. `_staying`: offsets
    of the tables that are not copied. `_start`: where copies begin.
    """

    def __init__(self, storage: Storage, bounds: Bounds, progress: Report) -> None:
        self._storage = storage
        self._progress = progress
        self._breathe = Breather()
        self._bounds = bounds
        self._header = bounds.header
        self._geometry = bounds.header.geometry
        self._start = self._next = bounds.end
        self._copies = 0
        self._end_of_copies = 0
        self._limit = max(held_bytes(storage), MIN_COPY_LIMIT)
        self._tables: dict[int, int] = {}
        self._slots = array("Q")
        self._targets = array("Q")
        self._staying = {self._header.l1_table_offset}

    async def plan(self) -> None:
        """Find out what must be copied, and where to. Raises CorruptError if it is too much, ENOSPC on a device that
        has no room for it behind all that is referred to."""
        used = await self._walk(copying=False)
        if not self._storage.fixed:
            return
        move = self._bounds.end - (used.end_of_marked() << self._geometry.cluster_bits)
        if self._next - move > self._bounds.end:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._storage.path)
        self._start -= move
        self._next -= move
        self._tables = {index: target - move for index, target in self._tables.items()}
        self._targets = array("Q", (target - move for target in self._targets))

    async def fence(self) -> None:
        """Step 2: what would become a valid reference when the file has grown must not."""
        if self._storage.fixed:
            await self._storage.sync()  # or an entry may be on the disk that still leads there
            await self._storage.punch(self._start, self._next - self._start)
            await self._storage.sync()
            return
        grown = Bounds.of(self._header, self._next)

        def fate(value: int, size: int) -> int:
            return value | _FENCE if not self._bounds.holds(value, size) and grown.holds(value, size) else value

        await self._rewrite(fate)
        await self._storage.truncate(self._bounds.end)  # a last part of a cluster must not show up in a copy
        await self._storage.sync()

    async def copy(self) -> None:
        """Step 3, by the same walk as `plan`."""
        if not self._storage.fixed:
            await self._storage.truncate(self._next)
        self._end_of_copies, self._next, self._copies = self._next, self._start, 0
        await self._walk(copying=True)
        await self._storage.sync()

    async def fix_entries(self) -> None:
        """Step 4, without its sync."""
        await self._rewrite(lambda value, size: value if self._bounds.holds(value, size) else 0, final=True)

    def _take(self, clusters: int) -> int:
        offset = self._next
        self._next += clusters * self._header.cluster_size
        self._copies += 1
        if self._next - self._start > self._limit or self._copies > MAX_COPIES:
            raise CorruptError(
                self._storage.path,
                f"too much is referenced more than once: a repair would copy over {self._limit >> 20} MiB or "
                f"{MAX_COPIES} clusters; copy out what can be read, to a new image",
            )
        return offset

    async def _walk(self, *, copying: bool) -> ClusterMap:
        """Visit everything reachable, and take a new place for each second reference. `copying`: and copy it there.
        Returns what was there before."""
        storage, bounds, bits = self._storage, self._bounds, self._geometry.cluster_bits
        used = ClusterMap(storage, bounds)
        used.mark(self._header.l1_table_offset >> bits, self._header.table_size)
        async for index, offset in L1Entries(storage, self._header, self._breathe):
            self._progress(index, self._geometry.table_entries)
            inside = bounds.entries_inside(index)
            if not inside or not bounds.holds(offset, self._geometry.table_bytes):
                continue
            target = None
            if used.mark(offset >> bits, self._header.table_size):
                target = self._tables[index] = self._take(self._header.table_size)
            else:
                self._staying.add(offset)
            async for position, chunk in TableChunks(storage, offset, inside * ENTRY_SIZE, self._breathe):
                marks = used.mark_entries(chunk)
                for entry in marks.again:
                    fresh = self._take(1)
                    if copying:
                        await self._copy_cluster(entry_at(chunk, entry), fresh)
                        pack_entry(chunk, entry, fresh)
                    elif target is None:
                        self._slots.append(offset + position + entry * ENTRY_SIZE)
                        self._targets.append(fresh)
                if copying and target is not None:
                    for entry in marks.invalid:
                        pack_entry(chunk, entry, 0)
                    await storage.write(target + position, [chunk])
        return used

    async def _copy_cluster(self, source: int, target: int) -> None:
        """A table is copied as it was before step 2. The target reads as zeroes, so those need no writing."""
        first = self._bounds.end - self._geometry.table_bytes
        size = self._header.cluster_size
        nearby = (source - number * size for number in range(self._header.table_size))
        fenced = not self._storage.fixed and any(offset in self._staying for offset in nearby)
        async for position, piece in TableChunks(self._storage, source, size, self._breathe):
            if fenced:
                for number, value in enumerate(unpack_entries(piece)):
                    if value % PAGE_SIZE == _FENCE and first < value < self._end_of_copies:
                        pack_entry(piece, number, value - _FENCE)
            await self._storage.write(target + position, [piece])

    async def _rewrite(self, fate: Fate, *, final: bool = False) -> None:
        """Give the entries of all tables that stay where they are the values that `fate` says.

        `final`: those past the image's end become 0, and what is copied is referred to at its new place.
        """
        size = self._geometry.table_bytes
        cursor = 0
        async for position, chunk in TableChunks(self._storage, self._header.l1_table_offset, size, self._breathe):
            before = bytes(chunk)
            for number, value in enumerate(unpack_entries(before)):
                index = position // ENTRY_SIZE + number
                if not value:
                    continue
                await self._breathe()
                self._progress(index, self._geometry.table_entries)
                new = 0 if final and not self._bounds.entries_inside(index) else fate(value, size)
                if index in self._tables:
                    new = self._tables[index] if final else value
                elif new == value and self._bounds.holds(value, size):
                    cursor = await self._rewrite_l2(index, value, fate, final, cursor)
                if new != value:
                    pack_entry(chunk, number, new)
            await write_changes(self._storage, self._header.l1_table_offset + position, before, chunk)

    async def _rewrite_l2(self, index: int, offset: int, fate: Fate, final: bool, cursor: int) -> int:
        """The L2 table at `offset`. `cursor` is the first of the moved entries that may be in it; returns the next."""
        inside = self._bounds.entries_inside(index) * ENTRY_SIZE
        async for position, chunk in TableChunks(self._storage, offset, self._geometry.table_bytes, self._breathe):
            before = bytes(chunk)
            for number, value in enumerate(unpack_entries(before)):
                if value > ZERO_CLUSTER and (new := fate(value, self._header.cluster_size)) != value:
                    pack_entry(chunk, number, new)
            if final:
                start, end = offset + position, offset + position + len(chunk)
                while cursor < len(self._slots) and start <= self._slots[cursor] < end:
                    pack_entry(chunk, (self._slots[cursor] - start) // ENTRY_SIZE, self._targets[cursor])
                    cursor += 1
                past = max(0, inside - position)
                chunk[past:] = bytes(max(0, len(chunk) - past))
            await write_changes(self._storage, offset + position, before, chunk)
        return cursor
