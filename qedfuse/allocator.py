"""Which clusters of the file are free. Pure bookkeeping, no I/O.

Invariant: *every cluster handed out reads as zeroes on the disk, durably*. Fresh clusters lie past the end of the file
as it was found (rounded up: a partial last cluster keeps its stale bytes to itself), and the file grows by truncate.
On a block device there are none: all that is handed out is free, for `commit.py` has zeroed it, or was freed.
A freed cluster comes back only after the four steps of its life:

    released   no table in memory refers to it
    committed  the table entry that freed it is durable          (`take_released`, then a sync)
    punched    its range has been punched                        (`add_punched`)
    free       the punch is durable                              (`take_punched`, a sync, `add_free`)
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Iterator

from qedfuse.geometry import Geometry, round_down, round_up


class Runs:
    """A set of clusters as sorted, merged (offset, bytes) runs."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((start, self._sizes[start]) for start in self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self._sizes.values())

    def add(self, start: int, size: int) -> None:
        """What is there already stays there once: a corrupt image refers to a cluster twice, and frees it twice."""
        end = start + size
        first = bisect_right(self._starts, start)
        if first and self._starts[first - 1] + self._sizes[self._starts[first - 1]] >= start:
            first -= 1
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._starts[last - 1] + self._sizes[self._starts[last - 1]])
        for known in self._starts[first:last]:
            del self._sizes[known]
        self._starts[first:last] = [start]
        self._sizes[start] = end - start

    def take_first(self, size: int, whole: bool) -> tuple[int, int] | None:
        """Remove up to `size` bytes from the front of the first run; with `whole`, from the first that has them all."""
        for position, start in enumerate(self._starts):
            have = self._sizes[start]
            if have >= size or not whole:
                taken = min(have, size)
                del self._sizes[start]
                if taken == have:
                    del self._starts[position]
                else:
                    self._starts[position] = start + taken
                    self._sizes[start + taken] = have - taken
                return start, taken
        return None

    def has(self, size: int) -> bool:
        """Whether a run has `size` bytes."""
        return any(have >= size for have in self._sizes.values())

    def take_last(self, end: int) -> int:
        """Remove the run that ends at `end`, if any. Returns where the remaining space ends."""
        if self._starts and self._starts[-1] + self._sizes[self._starts[-1]] == end:
            end = self._starts.pop()
            del self._sizes[end]
        return end

    def update(self, other: Runs) -> None:
        for start, size in other:
            self.add(start, size)


class Allocator:
    """Clusters of one file. Offsets and sizes in bytes, multiples of the cluster size.

    `fixed`: the file is a block device, whose end stays where it is. Handing out what is not there is ENOSPC then.
    """

    def __init__(self, geometry: Geometry, file_size: int, *, fixed: bool = False) -> None:
        self._geometry = geometry
        self._fixed = fixed
        #: Where fresh clusters begin; a part of a cluster at a device's end is no cluster.
        self.end = (round_down if fixed else round_up)(file_size, geometry.cluster_size)
        self._released = Runs()
        self._punched = Runs()
        self._free = Runs()

    def allocate(self, clusters: int) -> tuple[int, int]:
        """(offset, bytes) of one run of at most `clusters` clusters, at least one."""
        size = clusters * self._geometry.cluster_size
        return self._free.take_first(size, whole=False) or (self._fresh(size), size)

    def allocate_table(self) -> int:
        """The offset of one table's worth of clusters."""
        size = self._geometry.table_bytes
        found = self._free.take_first(size, whole=True)
        return found[0] if found else self._fresh(size)

    def next_free(self, file_size: int) -> tuple[int, int]:
        """Start and end of the run that `allocate` would take from; of fresh clusters, what the file covers."""
        for start, size in self._free:
            return start, start + size
        return self.end, max(self.end, round_down(file_size, self._geometry.cluster_size))

    def take(self, offset: int, size: int) -> None:
        """Hand out `size` bytes from the front of `next_free`, which must be at `offset` (AssertionError)."""
        taken = self._free.take_first(size, whole=True) if self._free else (self._fresh(size), size)
        if taken != (offset, size):
            raise AssertionError(
                f"{size} bytes of clusters at {offset:#x} were taken, which are not the next free ones"
            )

    def has_free(self, size: int) -> bool:
        """Whether a run of `size` bytes is free."""
        return self._free.has(size)

    def _fresh(self, size: int) -> int:
        if self._fixed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset = self.end
        self.end += size
        return offset

    def take_back(self, offset: int, size: int) -> None:
        """A run that was handed out, and to which nothing was written: it is free as it is.

        What is free at the end is not handed out any more, so that the file need not cover it (it may not be able to).
        """
        self._free.add(offset, size)
        if not self._fixed:
            self.end = self._free.take_last(self.end)

    def release(self, offset: int, size: int) -> None:
        """No table in memory refers to this run any more (or none ever did: its data could not be written)."""
        self._released.add(offset, size)

    @property
    def unused(self) -> int:
        """Bytes that are free, or on their way there."""
        return self._released.total + self._punched.total + self._free.total

    @property
    def recycling(self) -> bool:
        """Clusters are on their way back and want a sync."""
        return bool(self._released) or bool(self._punched)

    @property
    def released_runs(self) -> int:
        """How many runs wait for a commit."""
        return len(self._released)

    def take_released(self) -> Runs:
        taken, self._released = self._released, Runs()
        return taken

    def take_punched(self) -> Runs:
        taken, self._punched = self._punched, Runs()
        return taken

    def put_back(self, released: Runs, punched: Runs) -> None:
        """The sync that these runs waited for did not come about."""
        self._released.update(released)
        self._punched.update(punched)

    def add_punched(self, offset: int, size: int) -> None:
        self._punched.add(offset, size)

    def add_free(self, runs: Runs) -> None:
        self._free.update(runs)

    def put_free(self, offset: int, size: int) -> None:
        """A run of a device that reads as zeroes, durably."""
        self._free.add(offset, size)

    def trim(self) -> int:
        """Give up the free clusters at the end (all that are released count: nothing refers to them durably).

        Only for the last commit before closing. Returns the size that the file needs.
        """
        for runs in (self._released, self._punched):
            self._free.update(runs)
        self._released, self._punched = Runs(), Runs()
        if not self._fixed:
            self.end = self._free.take_last(self.end)
        return self.end
