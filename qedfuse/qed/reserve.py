"""The free clusters of a block device: what no table refers to.

A file's new clusters come from its end, which moves. A device has none that could move: its size is fixed, nothing says
how far an image on it reaches, and everywhere there may be stale bytes. So the tables are read once, before the first
cluster is handed out, and what they do not refer to is free: first what lies behind all the rest, then the gaps
(clusters that leaked). `file_growth.py` zeroes it before it is handed out.

QEMU takes the device's end for the image's: it never allocates anything on a device.
"""

from __future__ import annotations

import trio

from qedfuse.errors import CorruptError
from qedfuse.host.storage import Storage
from qedfuse.host.waiting import Breather
from qedfuse.qed.allocator import HostRun
from qedfuse.qed.cluster_map import ClusterMap, read_used
from qedfuse.qed.header import Header
from qedfuse.qed.table_walk import Bounds
from qedfuse.sizes import HostOffset

#: Runs that are taken at a time.
_MAX_RUNS = 256


class Reserve:
    """Free clusters of one image on a device; offsets and sizes in bytes, multiples of the cluster size."""

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self._header = header
        self._size = storage.size()  # a device may grow, of which the image knows nothing until it is opened anew
        self._bits = header.geometry.cluster_bits
        self._used: ClusterMap | None = None  # also what has been taken
        self._next = 0  # the cluster at which to look for the next run
        self._returned: list[HostRun] = []
        self._exhausted = 1 << 63  # no run has so many clusters
        self._failure: str | None = None
        self._finding = trio.Lock()

    async def find(self) -> None:
        """Read the tables, once. Until then no cluster may be handed out; an entry may go, which is found in the file,
        or not. Raises OSError, and can be called again, also when cancelled. That the tables are corrupt `take` says:
        what allocates nothing goes on."""
        async with self._finding:
            if self._used is not None or self._failure is not None:
                return
            try:
                used = await read_used(self._storage, Bounds.of(self._header, self._size), Breather())
            except CorruptError as error:
                self._failure = f"cannot tell which clusters are free: {error.message}"
                return
            self._used = used
            self._next = used.end_of_marked()

    @property
    def total(self) -> int:
        """Bytes that may still be taken; before `find`, all of the device."""
        if self._used is None:
            return 0 if self._failure else self._size
        free = self._used.clusters - self._header.header_size - self._used.marked
        return (free << self._bits) + sum(size for _offset, size in self._returned)

    async def take(self, least: int, most: int) -> list[HostRun]:
        """Runs (offset, size) of at least `least` bytes each, `most` together if there are so many; none: there are
        none left. They hold stale bytes. Raises OSError if the tables could not be read. Not for two tasks at once."""
        if self._failure is not None:
            raise CorruptError(self._storage.path, self._failure)
        assert self._used is not None
        if self._returned:
            taken, self._returned = self._returned, []
            return taken
        found: list[HostRun] = []
        breathe = Breather()
        wanted = least >> self._bits
        rest = max(most, least) >> self._bits
        while rest >= wanted and len(found) < _MAX_RUNS and wanted < self._exhausted:
            run = await self._find_run(self._used, wanted, rest, breathe)
            if run is None:
                self._exhausted = wanted
                break
            first, number = run
            self._used.mark(first, number)
            self._next = first + number
            found.append((HostOffset(first << self._bits), number << self._bits))
            rest -= number
        return found

    async def _find_run(self, used: ClusterMap, least: int, most: int, breathe: Breather) -> tuple[int, int] | None:
        """(first, number) of a free run, all in clusters, from `_next` on and then from the beginning."""
        for start, stop in ((self._next, used.clusters), (self._header.header_size, self._next)):
            first = used.next_free(start)
            while first < stop:
                await breathe()
                end = min(used.next_marked(first), used.clusters, first + most)
                if end - first >= least:
                    return first, end - first
                first = used.next_free(end)
        return None

    def put_back(self, runs: list[HostRun]) -> None:
        """Runs that could not be zeroed."""
        self._returned += runs
