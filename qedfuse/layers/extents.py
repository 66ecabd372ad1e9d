"""Where a host file has data and where it has holes, as far as a search has found out.

A cluster that has a place in an image may be a hole of the image's file all the same: it was discarded or zeroed, or
only a part of it was ever written. The file system tells (SEEK_DATA, SEEK_HOLE; a block device, or a host that is not
to be waited for, has no holes), and what it has told once answers for all clusters that lie there, in whatever order.

A call may take long: a file of a million extents is gone through to find the end of its data, and a punch of all of it
is waited for. So they are made in a thread, many at a time, and the more, the longer the search goes on.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from qedfuse.host.storage import HostExtent, ReadStorage

#: Extents that are asked for at a time: at first, and at most.
_FEW = 8
_MANY = 1024
#: Extents that are remembered.
_MOST = 4096


class HostExtents:
    """What is known of `storage`. For one search: it is not noticed when the file changes.

    Offsets are bytes of the file. `ahead`: how many ranges `learn` likes to be given.
    """

    def __init__(self, storage: ReadStorage) -> None:
        self.ahead = _FEW
        self._storage = storage
        self._starts: list[int] = []
        self._extents: list[HostExtent] = []

    def known(self, start: int, end: int) -> list[HostExtent]:
        """The range cut into data and holes, from its start on as far as that is known."""
        parts = []
        while start < end:
            index = bisect_right(self._starts, start) - 1
            if index < 0 or self._extents[index].end <= start:
                break
            extent = self._extents[index]
            parts.append(HostExtent(start, min(end, extent.end), extent.is_data))
            start = extent.end
        return parts

    async def learn(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Ask for ranges (start, end), none of them empty: something is known at each start then. Raises OSError."""
        if len(self._starts) > _MOST:
            self._starts, self._extents = [], []
        wanted = sorted(ranges)
        for extent in await self._storage.find_extents(wanted, max(1, self.ahead // len(wanted))):
            first, last = bisect_left(self._starts, extent.start), bisect_left(self._starts, extent.end)
            self._starts[first:last] = [extent.start]
            self._extents[first:last] = [extent]
        self.ahead = min(2 * self.ahead, _MANY)
