"""Data and holes of a layer: what SEEK_DATA and SEEK_HOLE find.

A hole is what reads as zeroes without any bytes being stored for it: zero clusters, clusters that no layer has, and
what the host has holes for in the image's clusters and its backing files'. Data is everything else, even if it consists
of zeroes.

A process that waits for an lseek cannot be killed. A hostile image makes a search through exabytes of tables out of
one, and so a search is given up after `PATIENCE` seconds, with an answer that is allowed for any file: here may be
data.

Source: lseek(2).
"""

from __future__ import annotations

import time
from bisect import bisect_right
from contextlib import aclosing
from typing import NamedTuple

from qedfuse.layers.layer import Layer
from qedfuse.layers.mapping import walk

#: Seconds; time for a terabyte of tables that say "zeroes" and "data" cluster by cluster.
PATIENCE = 2.0


#: Segments that are found at a time.
_MANY = 1024


class Segments(NamedTuple):
    """Data and holes in turn, from `start` on: `is_data` is the first of them, `ends` is where each ends."""

    start: int
    is_data: bool
    ends: list[int]

    def seek(self, offset: int, *, data: bool) -> int | None:
        """The first byte at or behind `offset` that is data, or in a hole; the layer's size: there is none. None: it is
        not known."""
        index = bisect_right(self.ends, offset)
        if offset < self.start or index == len(self.ends):
            return None
        return offset if data is (self.is_data ^ bool(index & 1)) else self.ends[index]


async def find_segments(layer: Layer, offset: int, *, data: bool, ahead: float = 0) -> Segments:
    """What is at `offset`, and where it ends: a hole where data begins, data where a hole begins, if that is sought
    (not `data`), and where that hole ends. Nothing from the layer's end on. Raises OSError.

    `ahead`: seconds for which the search goes on after that, for what will be asked for next. After `PATIENCE` it is
    given up: a hole ends where it came to then, data at the layer's end.
    """
    found = Segments(offset, False, [])
    ends, wanted = found.ends, 1
    enough = False
    deadline = time.monotonic() + PATIENCE
    async with aclosing(walk(layer, offset, layer.size)) as entries:
        async for entry in entries:
            if entry.start == offset and entry.data:
                found, wanted = Segments(offset, True, ends), 0 if data else 2
            if entry.data is not found.is_data ^ bool(len(ends) & 1):
                ends.append(entry.start)
            now = time.monotonic()
            if not enough and len(ends) >= wanted:
                enough, deadline = True, now + ahead
            if enough and (now >= deadline or len(ends) >= _MANY):
                return found
            if not enough and now > deadline and entry.start > (ends[-1] if ends else offset):
                ends.append(layer.size if entry.data else entry.start)
                return found
    if offset < layer.size:
        ends.append(layer.size)
    return found
