"""Which clusters of the file can be handed out. Pure bookkeeping, no I/O.

Invariant: *every cluster handed out reads as zeroes on the disk, durably*. Fresh clusters lie past the end of the file
as it was found (rounded up: a partial last cluster keeps its stale bytes to itself), and the file grows by truncate.
On a block device there are none: what is handed out there is free, for `file_growth.py` has zeroed it.

A cluster to which an entry refers stays with its guest for good: zeroed or discarded, it becomes a hole of the host. So
what is free is only what was handed out in vain. If nothing was written to it, it is so at once (`take_back`). If its
data could not be written, or the write was cancelled, it is *lost* until a commit has punched it, durably.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from qedfuse.qed.geometry import Geometry
from qedfuse.sizes import HostOffset, round_down, round_up

#: Where clusters lie in the file, and how many bytes.
HostRun = tuple[HostOffset, int]


class Allocator:
    """Clusters of one file. Offsets and sizes in bytes, multiples of the cluster size.

    `fixed`: the file is a block device, whose end stays where it is. Handing out what is not there is ENOSPC then.
    """

    def __init__(self, geometry: Geometry, file_size: int, *, fixed: bool = False) -> None:
        self._geometry = geometry
        self._fixed = fixed
        #: Where fresh clusters begin; a part of a cluster at a device's end is no cluster.
        self.end = HostOffset((round_down if fixed else round_up)(file_size, geometry.cluster_size))
        self._free: list[HostRun] = []  # a few runs: sorted, merged
        self._lost: list[HostRun] = []

    def allocate(self, clusters: int) -> tuple[HostOffset, int]:
        """(offset, bytes) of one run of at most `clusters` clusters, at least one."""
        size = clusters * self._geometry.cluster_size
        if self._free:
            size = min(size, self._free[0][1])
            return self._take_free(0, size), size
        return self._fresh(size), size

    def allocate_table(self) -> HostOffset:
        """The offset of one table's worth of clusters."""
        size = self._geometry.table_bytes
        for position, (_start, have) in enumerate(self._free):
            if have >= size:
                return self._take_free(position, size)
        return self._fresh(size)

    def next_free(self, file_size: int) -> tuple[HostOffset, HostOffset]:
        """Start and end of the run that `allocate` would take from; of fresh clusters, what the file covers."""
        if self._free:
            start, size = self._free[0]
            return start, start + size
        return self.end, max(self.end, HostOffset(round_down(file_size, self._geometry.cluster_size)))

    def take(self, offset: HostOffset, size: int) -> None:
        """Hand out `size` bytes from the front of `next_free`, which must be at `offset` (AssertionError)."""
        start, end = self.next_free(offset + size)
        if offset != start or offset + size > end:
            raise AssertionError(
                f"{size} bytes of clusters at {offset:#x} were taken, which are not the next free ones"
            )
        if self._free:
            self._take_free(0, size)
        else:
            self._fresh(size)

    def has_free(self, size: int) -> bool:
        """Whether a run of `size` bytes is free."""
        return any(have >= size for _start, have in self._free)

    @property
    def free(self) -> int:
        """Bytes."""
        return sum(size for _start, size in self._free)

    @property
    def lost(self) -> int:
        """Bytes that are free after a commit."""
        return sum(size for _start, size in self._lost)

    def _take_free(self, position: int, size: int) -> HostOffset:
        """From the front of a free run. Returns its offset."""
        start, have = self._free.pop(position)
        if have > size:
            self._free.insert(position, (start + size, have - size))
        return start

    def _fresh(self, size: int) -> HostOffset:
        if self._fixed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset = self.end
        self.end += size
        return offset

    # -- the way back -------------------------------------------------------------------------------------------------

    def take_back(self, offset: HostOffset, size: int) -> None:
        """A run that was handed out, and to which nothing was written: it is free as it is.

        What is free at the end is not handed out any more, so that the file need not cover it (it may not be able to).
        """
        self.put_free([(offset, size)])
        self.trim()

    def lose(self, offset: HostOffset, size: int) -> None:
        """A run that was handed out, to which something may have been written, and to which no entry refers."""
        self._lost.append((offset, size))

    @property
    def has_lost(self) -> bool:
        """Whether there is something for a commit to punch."""
        return bool(self._lost)

    def take_lost(self) -> list[HostRun]:
        """What is lost, to be punched and given to `put_free`, after a sync, or to `lose` again."""
        taken, self._lost = self._lost, []
        return taken

    def put_free(self, runs: Iterable[HostRun]) -> None:
        """Runs that read as zeroes, durably, and to which no entry refers."""
        merged: list[HostRun] = []
        for start, length in sorted([*self._free, *runs]):
            if merged and sum(merged[-1]) == start:
                start, length = merged[-1][0], merged.pop()[1] + length
            merged.append((start, length))
        self._free = merged

    def trim(self) -> HostOffset:
        """Give up the free clusters at the end. Returns the size that the file needs."""
        if not self._fixed and self._free and sum(self._free[-1]) == self.end:
            self.end = self._free.pop()[0]
        return self.end

    def forget_free(self) -> None:
        """Whatever is free or lost: it is found anew, in another way."""
        self._free, self._lost = [], []

    def cut(self, end: HostOffset) -> None:
        """Give up all clusters behind `end`, free and lost ones, too: no entry refers to one."""
        self.end = end
        for runs in (self._free, self._lost):
            runs[:] = [(start, min(size, end - start)) for start, size in runs if start < end]
