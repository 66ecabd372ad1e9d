"""An image's L1 and L2 tables in memory: look up, map, change. Reads pages on demand, writes nothing.

Both levels are kept as pages of 4 KiB (`table_pages.py`): a cold look-up costs one page of each, opening none.
What is changed here is seen by every reader at once and waits, pinned, for `commit.py` to write it: `dirty_l1`,
`dirty_l2` and `new_tables` are the two modules' interface.

An L2 page's index counts pages over the whole guest (cluster >> 9); an L1 page's counts from the table's start.

Source: QEMU docs/interop/qed_spec, "Tables" and "Cluster offset translation".
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from qedfuse.errors import CorruptError
from qedfuse.host.storage import Storage, fill, size_in_sectors
from qedfuse.host.waiting import Event, new_event
from qedfuse.layers.extents import HostExtents
from qedfuse.layers.runs import NO_PLACE, Kind, Run, append_run
from qedfuse.qed.allocator import Allocator, HostRun
from qedfuse.qed.entry_runs import end_of_run, unallocated_from
from qedfuse.qed.geometry import ZERO_CLUSTER
from qedfuse.qed.header import Header
from qedfuse.qed.table_pages import ZERO_PAGE, Page, PageMap, PagePool
from qedfuse.qed.table_walk import Bounds
from qedfuse.sizes import (
    PAGE_BITS,
    PAGE_ENTRIES,
    PAGE_SIZE,
    ClusterIndex,
    GuestOffset,
    HostOffset,
    PageIndex,
    TableIndex,
)

_PAGE_MASK = PAGE_ENTRIES - 1
_MAX_STEPS = 256


class FileEnd:
    """Where the clusters end of a file that is open for reading. (Of one that is open for writing the allocator says
    so: that is where it goes on.)"""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.look_again()

    def look_again(self) -> None:
        """Another process may be writing it (-U)."""
        self.end = size_in_sectors(self._storage)


class Tables:
    """The mapping of one image. Where its clusters may lie in the file, `ends` says.

    `lenient`: an entry that points outside the file counts as unallocated, as `recovery.py` would make it (an unclean
    image that is open read-only); otherwise it is a CorruptError. One that the file's end cuts off always is.
    """

    def __init__(self, storage: Storage, header: Header, pool: PagePool, *, lenient: bool = False) -> None:
        self._storage = storage
        self._header = header
        self.geometry = header.geometry
        self._l1_offset = header.l1_table_offset
        self._data_start = header.header_bytes
        self._lenient = lenient
        self.ends: FileEnd | Allocator = FileEnd(storage)
        self.l1 = PageMap(pool)
        self.l2 = PageMap(pool)
        self.dirty_l1: set[int] = set()
        self.dirty_l2: set[int] = set()
        self.new_tables: dict[TableIndex, HostOffset] = {}  # the file's L1 table does not refer to them
        self._loading: dict[tuple[PageMap, int], Event] = {}

    # -- looking up ---------------------------------------------------------------------------------------------------

    def page_nowait(self, index: PageIndex) -> Page | None:
        """The L2 page `index`, zeroes if its table does not exist, None if it must be loaded."""
        page = self.l2.pages.get(index)
        if page is None:
            return ZERO_PAGE if self._table_nowait(index >> self.geometry.table_page_bits) == 0 else None
        return page

    def map_prefix(self, offset: GuestOffset, size: int, steps: int = sys.maxsize) -> list[Run]:
        """Runs from `offset` as far as the tables are in memory, at most `size` bytes. Raises CorruptError.

        `steps` bounds the work, and the number of runs: a step is one run, or a page of a longer one.
        """
        runs: list[Run] = []
        bits = self.geometry.cluster_bits
        end = offset + size
        while offset < end and steps > 0:
            steps -= 1
            cluster = offset >> bits
            page = self.l2.pages.get(cluster >> PAGE_BITS)
            if page is not None:
                kind, count, host = self._run_in_page(page, cluster, -(-end >> bits) - cluster)
                host += offset & (self.geometry.cluster_size - 1) if kind is Kind.DATA else 0
            else:
                count = self._absent_clusters(cluster)
                if count == 0:
                    break
                kind, host = Kind.UNALLOCATED, NO_PLACE
            length = min((cluster + count << bits) - offset, end - offset)
            append_run(runs, kind, length, host)
            offset += length
        return runs

    async def map(self, offset: GuestOffset, size: int) -> list[Run]:
        """As `map_prefix`, but at least one run: loads the page it needs first. Raises OSError, CorruptError.

        However large the range, this takes no more than some milliseconds and kilobytes.
        """
        while True:
            runs = self.map_prefix(offset, size, _MAX_STEPS)
            if runs or not size:
                return runs
            await self.load(offset >> self.geometry.cluster_bits >> PAGE_BITS)

    async def measure_blank(self, offset: GuestOffset, size: int, extents: HostExtents) -> int:
        """Bytes from `offset` on, at most `size`, that are unallocated since the file has a hole where their pages of
        an L2 table should be, and none of these is in memory. 0: have a look. Raises OSError, CorruptError."""
        index = offset >> self.geometry.cluster_bits >> PAGE_BITS
        l1_index = index >> self.geometry.table_page_bits
        table = None if index in self.l2.pages or l1_index in self.new_tables else self._table_nowait(l1_index)
        if not table:
            return 0
        start, end = table + self._in_table(index), table + self.geometry.table_bytes
        known = extents.known(start, end)
        if not known:
            await extents.learn([(start, end)])
            known = extents.known(start, end)
        if known[0].is_data or self._table_nowait(l1_index) != table:
            return 0
        pages = min((known[0].end - start) // PAGE_SIZE, _MAX_STEPS)
        stop = next((page for page in range(index, index + pages) if page in self.l2.pages), index + pages)
        return min((stop << self.geometry.cluster_bits + PAGE_BITS) - offset, size) if stop > index else 0

    def _run_in_page(self, page: Page, cluster: ClusterIndex, limit: int) -> tuple[Kind, int, HostOffset]:
        """The run that starts at `cluster`, inside its page, at most `limit` clusters: kind, clusters, host offset."""
        first = cluster & _PAGE_MASK
        stop = min(PAGE_ENTRIES, first + limit)
        entry = page[first]
        step = self.geometry.cluster_size
        count = end_of_run(page, first, stop, step) - first
        if entry <= ZERO_CLUSTER:
            return (Kind.ZERO if entry else Kind.UNALLOCATED), count, NO_PLACE
        if self.holds(entry, count * step):
            return Kind.DATA, count, HostOffset(entry)
        if count > 1:  # find the good part
            return self._run_in_page(page, cluster, 1)
        if self._may_be_missing(entry, step):
            return Kind.UNALLOCATED, 1, NO_PLACE
        raise CorruptError(
            self._storage.path,
            f"corrupt: guest offset {cluster * step:#x} is mapped to {entry:#x}, which is no cluster of the file; "
            "see qedfuse check",
        )

    def _absent_clusters(self, cluster: ClusterIndex) -> int:
        """How many clusters from here on lie in L2 tables that do not exist; 0 if that is not known yet."""
        entries = self.geometry.table_entries
        index = cluster >> PAGE_BITS >> self.geometry.table_page_bits
        if self._table_nowait(index) != 0:
            return 0
        page = self.l1.pages[index >> PAGE_BITS]
        tables = 1  # also where `lenient` made it so
        if index & _PAGE_MASK < _PAGE_MASK:
            tables += unallocated_from(page, (index & _PAGE_MASK) + 1)
        return (index + tables) * entries - cluster

    def _table_nowait(self, l1_index: TableIndex) -> HostOffset | None:
        """The offset of an L2 table, 0 if there is none, None if the L1 page must be loaded."""
        page = self.l1.pages.get(l1_index >> PAGE_BITS)
        if page is None:
            return None
        offset = HostOffset(page[l1_index & _PAGE_MASK])
        if offset == 0 or self.holds(offset, self.geometry.table_bytes):
            return offset
        if self._may_be_missing(offset, self.geometry.table_bytes):
            return NO_PLACE
        raise CorruptError(
            self._storage.path,
            f"corrupt: l1 entry {l1_index} is {offset:#x}, where no table of the file can be; see qedfuse check",
        )

    def holds(self, offset: int, size: int) -> bool:
        """Whether a run of clusters can lie here: aligned, behind the header, inside the file."""
        ends = self.ends
        if offset + size > ends.end and isinstance(ends, FileEnd):
            ends.look_again()
        return self.geometry.is_place(offset, size, self._data_start, ends.end)

    def _may_be_missing(self, offset: int, size: int) -> bool:
        """Whether what this file does not hold counts as not there at all."""
        return self._lenient and not Bounds.of(self._header, self.ends.end).cuts(offset, size)

    # -- loading ------------------------------------------------------------------------------------------------------

    async def load(self, index: PageIndex) -> None:
        """See to it that `page_nowait(index)` gives a page. Raises OSError, CorruptError.

        Cancellation is harmless. Other tasks may run, and the page may leave again at the caller's next await.
        """
        while self.page_nowait(index) is None:
            l1_index = index >> self.geometry.table_page_bits
            table = self._table_nowait(l1_index)
            if table is None:
                await self._load_l1(l1_index)
            elif l1_index in self.new_tables:  # what was never put into a new table is zeroes, and in no file yet
                self.l2.insert(index, table + self._in_table(index), None)
            else:
                await self._load_page(self.l2, index, table + self._in_table(index))

    async def table(self, l1_index: TableIndex) -> HostOffset:
        """The offset of an L2 table, 0 if there is none. Raises OSError, CorruptError."""
        while (offset := self._table_nowait(l1_index)) is None:
            await self._load_l1(l1_index)
        return offset

    async def _load_l1(self, l1_index: TableIndex) -> None:
        l1_page = l1_index >> PAGE_BITS
        await self._load_page(self.l1, l1_page, self._l1_offset + l1_page * PAGE_SIZE)

    async def _load_page(self, level: PageMap, index: int, host: int) -> None:
        """Read one page, once at a time: it must not be changed while an old copy of it is on its way."""
        busy = self._loading.get((level, index))
        if busy is not None:
            await busy.wait()
            return
        done = self._loading[level, index] = new_event()
        try:
            content = bytearray(PAGE_SIZE)
            await fill(self._storage, host, memoryview(content))
            if self._loading.get((level, index)) is done:  # or the table has been dropped meanwhile
                level.insert(index, host, content)
        finally:
            if self._loading.get((level, index)) is done:
                del self._loading[level, index]
            done.set()

    def take_page(self, level: PageMap, index: int, host: int, content: bytes) -> bool:
        """Put a page that was read outside this module into memory. Returns whether it was put there.

        `level`: `l1` or `l2`. `index`: the page's index in that level, in pages. `host`: its offset in the file, bytes.
        `content`: its 4 KiB (512 entries) as in the file. They must have been read after the page was found missing,
        and without an await since then, or they may be older than what was changed meanwhile.

        True is valid until the next await, or until another page comes into the pool: this one, which is clean, may
        leave it then. False: the page was in memory, or a task is reading it, to change it next perhaps. Of a table
        that is not in the file yet zeroes are taken, whatever was read there."""
        if index in level.pages or (level, index) in self._loading:
            return False
        new = level is self.l2 and index >> self.geometry.table_page_bits in self.new_tables
        level.insert(index, host, None if new else content)
        return True

    def _in_table(self, index: PageIndex) -> int:
        """The byte offset of an L2 page in its table."""
        return (index & (self.geometry.table_pages - 1)) * PAGE_SIZE

    # -- changing -----------------------------------------------------------------------------------------------------

    async def prepare(self, index: PageIndex, allocator: Allocator) -> Page:
        """The L2 page `index`, ready to be changed (at once, before the next await); its table is made if need be."""
        await self.load(index)
        page = self.l2.pages.get(index)
        if page is None:  # no table: the load found an L1 entry of 0
            l1_index = index >> self.geometry.table_page_bits
            offset = self.new_tables[l1_index] = allocator.allocate_table()
            self._set_table(l1_index, offset)
            page = self.l2.insert(index, offset + self._in_table(index), None)
        return page

    def has_table(self, index: PageIndex) -> bool:
        """Whether `prepare(index)`, right after a `load`, has a table to put the page in."""
        return index in self.l2.pages

    def changed(self, index: PageIndex) -> None:
        """The L2 page `index` was changed: keep it until it is written."""
        self.l2.pin(index)
        self.dirty_l2.add(index)

    def settled(self, l1_index: TableIndex) -> bool:
        """Whether the file has all of an L2 table that there is, and no commit is writing any of it."""
        return l1_index not in self.new_tables and self.l2.pinned.isdisjoint(self._pages_of(l1_index))

    def drop_table(self, l1_index: TableIndex) -> None:
        """Take away an L2 table that is settled, whose range is locked and whose `table` was asked for just now."""
        assert self.settled(l1_index)
        for index in self._pages_of(l1_index):
            self._loading.pop((self.l2, index), None)
            if index in self.l2.pages:
                self.l2.drop(index)
        self._set_table(l1_index, 0)

    def data_runs(self, entries: Iterable[int]) -> Iterator[HostRun]:
        """The clusters that L2 entries map, as runs (offset, bytes); passes over what points at no cluster."""
        step = self.geometry.cluster_size
        start = end = 0
        for entry in entries:
            if start and entry == end and end + step <= self.ends.end:
                end += step
            elif entry > ZERO_CLUSTER and self.holds(entry, step):
                if start:
                    yield HostOffset(start), end - start
                start, end = entry, entry + step
        if start:
            yield HostOffset(start), end - start

    def _pages_of(self, l1_index: TableIndex) -> range:
        return range(l1_index * self.geometry.table_pages, (l1_index + 1) * self.geometry.table_pages)

    def _set_table(self, l1_index: TableIndex, offset: int) -> None:
        l1_page = l1_index >> PAGE_BITS
        self.l1.pages[l1_page][l1_index & _PAGE_MASK] = offset
        self.l1.pin(l1_page)
        self.dirty_l1.add(l1_page)

    @property
    def dirty_pages(self) -> int:
        return len(self.l2.pinned) + len(self.l1.pinned)

    def begin_writing(self, allocator: Allocator) -> None:
        """Forget what is known of the file, which is open for writing from now on. Nothing may be changed yet."""
        assert not (self.dirty_l1 or self.dirty_l2 or self.new_tables)
        self._loading.clear()  # what is being read does not come into memory
        self.close()
        self._lenient = False
        self.ends = allocator

    def close(self) -> None:
        """Free all pages of the pool that are held here."""
        self.l1.clear()
        self.l2.clear()
