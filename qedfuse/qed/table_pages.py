"""A bounded pool of table pages: the memory that holds what is known of the mapping.

A page is 4 KiB of an L1 or L2 table, 512 little-endian 64-bit entries, viewed in place (`memoryview` of format "Q").
Pages of every open image share one pool, so memory is bounded for a directory of thousands as for one. Clean pages
leave in the order they came; a pinned page (changed, not yet written) stays. If all are pinned the pool grows for a
while: what pins pages must see to it that they get written. A pool is for one thread.

A view must not be kept across an `await`: the page may leave meanwhile.
"""

from __future__ import annotations

import mmap
import sys
import threading
from typing import Protocol

from qedfuse.errors import UnsupportedError
from qedfuse.host.limits import reserve
from qedfuse.sizes import PAGE_ENTRIES, PAGE_SIZE

if sys.byteorder != "little":
    raise UnsupportedError("", "qedfuse needs a little-endian machine")

DEFAULT_CAPACITY = (16 << 20) // PAGE_SIZE
#: Bytes of address space for a pool; see `limits.reserve`.
_RESERVED = 1 << 30

Page = memoryview
ZERO_PAGE: Page = memoryview(bytes(PAGE_SIZE)).cast("Q")


class PagePool:
    """`capacity` in pages: how many may be held before clean ones leave."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self.capacity = capacity
        self._memory = reserve(_RESERVED, 2 * capacity * PAGE_SIZE)
        self._slots = len(self._memory) // PAGE_SIZE
        self._whole = memoryview(self._memory)
        self._free: list[int] = []
        self._used = 0  # slots ever handed out
        self._clean: dict[tuple[PageMap, int], None] = {}  # insertion order is the order of leaving

    @property
    def in_use(self) -> int:
        return self._used - len(self._free)

    def view(self, slot: int) -> Page:
        return self._whole[slot * PAGE_SIZE : (slot + 1) * PAGE_SIZE].cast("Q")

    def take(self) -> int:
        """A slot for a new page; its content is undefined."""
        while self.in_use >= self.capacity and self._clean:
            owner, index = next(iter(self._clean))
            owner.drop(index)
        if self._free:
            return self._free.pop()
        if self._used >= self._slots:
            raise MemoryError("all table pages are waiting to be written")
        self._used += 1
        return self._used - 1

    def give_back(self, slot: int) -> None:
        if self._used - len(self._free) > self.capacity:  # grown by pinned pages: return the memory
            self._memory.madvise(mmap.MADV_DONTNEED, slot * PAGE_SIZE, PAGE_SIZE)
        self._free.append(slot)

    def set_clean(self, owner: PageMap, index: int, clean: bool) -> None:
        if clean:
            self._clean[owner, index] = None
        else:
            self._clean.pop((owner, index), None)


class _Shared(threading.local):
    pool: PagePool | None = None


_shared = _Shared()


def shared_pool() -> PagePool:
    """The pool of all images of this thread. (A page that comes may drive out another image's.)"""
    if _shared.pool is None:
        _shared.pool = PagePool()
    return _shared.pool


class PageWatcher(Protocol):
    """An observer, which is told where the pages of a level are in memory."""

    def insert(self, index: int, page: Page, /) -> None: ...

    def drop(self, index: int, /) -> None: ...


class PageMap:
    """One table level of one image: page index -> page. Look-ups are `map.pages.get(index)`."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._slots: dict[int, int] = {}
        self.pages: dict[int, Page] = {}
        self.hosts: dict[int, int] = {}  # where each page lies in the file
        self.pinned: set[int] = set()
        self._watcher: PageWatcher | None = None

    def watch(self, watcher: PageWatcher | None) -> None:
        """Tell `watcher` of every page there is and of every one that comes or goes, from now on."""
        self._watcher = watcher
        if watcher is not None:
            for index, page in self.pages.items():
                watcher.insert(index, page)

    def insert(self, index: int, host: int, content: bytes | bytearray | None) -> Page:
        """Add a page that is not there, whose place in the file is `host`: 4 KiB as on disk, or None for zeroes."""
        slot = self._pool.take()
        page = self._pool.view(slot)
        page[:] = ZERO_PAGE if content is None else memoryview(content).cast("Q")
        self._slots[index] = slot
        self.hosts[index] = host
        self.pages[index] = page
        self._pool.set_clean(self, index, True)
        if self._watcher is not None:
            self._watcher.insert(index, page)
        return page

    def pin(self, index: int) -> None:
        """Keep a page until `unpin`: it holds what no file holds yet."""
        if index not in self.pinned:
            self.pinned.add(index)
            self._pool.set_clean(self, index, False)

    def unpin(self, index: int) -> None:
        self.pinned.remove(index)
        self._pool.set_clean(self, index, True)

    def drop(self, index: int) -> None:
        """Forget a page, changed or not."""
        if self._watcher is not None:
            self._watcher.drop(index)
        self.pinned.discard(index)
        self._pool.set_clean(self, index, False)
        del self.pages[index], self.hosts[index]
        self._pool.give_back(self._slots.pop(index))

    def clear(self) -> None:
        for index in list(self.pages):
            self.drop(index)


assert ZERO_PAGE.nbytes == PAGE_SIZE and len(ZERO_PAGE) == PAGE_ENTRIES
