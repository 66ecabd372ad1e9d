"""Holes of an image: finding them (SEEK_DATA, SEEK_HOLE) and making them (fallocate), on the engine, without FUSE.

A hole is what reads as zeroes without any bytes being stored for it: zero clusters, clusters that no layer has, and
what the host has holes for in the image's clusters and its backing files'. Data is everything else, even if it consists
of zeroes.

Whoever waits for an lseek cannot be killed. A hostile image makes a search through exabytes of tables out of one, and
so a search is given up after `PATIENCE` seconds, with an answer that is allowed for any file: here may be data.

Source: lseek(2), fallocate(2).
"""

from __future__ import annotations

import errno
import os
import time
from bisect import bisect_right
from contextlib import aclosing
from typing import NamedTuple

from qedfuse.file_storage import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, FileStorage
from qedfuse.image import Image
from qedfuse.layer import Layer
from qedfuse.mapping import walk

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
    """What is at `offset`, and where it ends: a hole where data begins, data where a hole begins, for whoever seeks one
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


class LastSegments:
    """What was found last: programs go from one segment to the next, and through a large one in small steps."""

    def __init__(self) -> None:
        self._image: Image | None = None
        self._version = (0, 0, 0)
        self._segments = Segments(0, False, [])

    def note(self, image: Image, version: tuple[int, int, int], segments: Segments) -> None:
        """`version`: the image's when the search began."""
        if segments.ends:
            self._image, self._version, self._segments = image, version, segments

    def seek(self, image: Image, offset: int, *, data: bool) -> int | None:
        """See `Segments.seek`. None also if it is known no longer."""
        return self._segments.seek(offset, data=data) if self._holds(image) else None

    def find(self, image: Image, offset: int, *, data: bool) -> Segments | None:
        """What `find_segments` would find, if it is known."""
        segments = self._segments
        index = bisect_right(segments.ends, offset)
        if not self._holds(image) or offset < segments.start or index == len(segments.ends):
            return None
        rest = Segments(offset, segments.is_data ^ bool(index & 1), segments.ends[index:])
        wanted = 1 if not rest.is_data else 0 if data else 2
        return rest if len(rest.ends) >= wanted or rest.ends[-1] == image.size else None

    def _holds(self, image: Image) -> bool:
        return image is self._image and image.version == self._version


async def fallocate(image: Image, mode: int, offset: int, size: int) -> None:
    """fallocate(2) on the raw file. Bytes; `mode` as there. Raises OSError; EOPNOTSUPP for what cannot be done here.

    PUNCH_HOLE and ZERO_RANGE make the range read as zeroes and give its space back where the host can. ZERO_RANGE past
    the end grows the image, unless KEEP_SIZE is given.

    Preallocation (mode 0) grows the image if the range ends past its end. It reserves nothing, as on other file systems
    that allocate on write, but is refused with ENOSPC if what the range lacks does not fit on the host now.
    """
    keep_size = bool(mode & FALLOC_FL_KEEP_SIZE)
    action = mode & ~FALLOC_FL_KEEP_SIZE
    if action not in (0, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE) or mode == FALLOC_FL_PUNCH_HOLE:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    if action == 0:
        await _check_space(image, offset, size)
    if not keep_size and offset + size > image.size:
        await image.resize(offset + size)
    if action != 0:
        await image.zero(offset, size)


async def _check_space(image: Image, offset: int, size: int) -> None:
    """Is there room on the host for what a range lacks?"""
    if not isinstance(image.storage, FileStorage):
        return
    room = await image.measure_room()
    if room is None:
        host = await image.storage.statvfs()
        if not host.f_blocks:  # ramfs and some FUSE file systems do not say: as much as there is
            return
        room = host.f_bavail * host.f_frsize
    missing = max(0, offset + size - max(offset, image.size))
    end = min(offset + size, image.size)
    async with aclosing(walk(image, offset, max(offset, end), below=False)) as entries:
        async for entry in entries:
            missing += 0 if entry.data else entry.length
            if missing > room:
                break
    if missing > room:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
