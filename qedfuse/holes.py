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
from contextlib import aclosing

from qedfuse.file_storage import FileStorage
from qedfuse.image import Image
from qedfuse.layer import Layer
from qedfuse.mapping import Search, walk

#: Seconds; time for a terabyte of tables that say "zeroes" and "data" cluster by cluster.
PATIENCE = 2.0

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10


async def next_data(layer: Layer, offset: int, search: Search | None = None) -> int | None:
    """The first byte at or behind `offset` that is data, None if there is none. Raises OSError as reading does.

    After `PATIENCE`: a byte behind `offset` before which there is none. `search`: see `walk`.
    """
    found, tired = await _find(layer, offset, search, data=True)
    return None if found == layer.size and not tired else found


async def next_hole(layer: Layer, offset: int, search: Search | None = None) -> int:
    """The first byte at or behind `offset` that is in a hole; the image's end counts as one. Raises OSError.

    After `PATIENCE`: the image's end.
    """
    found, tired = await _find(layer, offset, search, data=False)
    return layer.size if tired else found


async def _find(layer: Layer, offset: int, search: Search | None, *, data: bool) -> tuple[int, bool]:
    """Where what is looked for begins (the layer's end: nowhere), or how far the search came before it was given up."""
    deadline = time.monotonic() + PATIENCE
    async with aclosing(walk(layer, offset, layer.size, search=search)) as entries:
        async for entry in entries:
            if entry.data is data:
                return entry.start, False
            if entry.start > offset and time.monotonic() > deadline:
                return entry.start, True
    return layer.size, False


class LastExtent:
    """The hole, or the data, that was found last: programs go through a large one in small steps."""

    def __init__(self) -> None:
        self._image: Image | None = None
        self._version = (0, 0, 0)
        self._start = self._end = 0
        self._is_data = False

    def note(self, image: Image, version: tuple[int, int, int], start: int, end: int, *, is_data: bool) -> None:
        """`version`: the image's when the search began."""
        self._image, self._version = image, version
        self._start, self._end, self._is_data = start, end, is_data

    def seek(self, image: Image, offset: int, *, data: bool) -> int | None:
        """The first byte at or behind `offset` that is data, or in a hole; the image's size: there is none. None: it is
        not known, or no longer."""
        if image is not self._image or image.version != self._version or not self._start <= offset < self._end:
            return None
        return offset if data is self._is_data else self._end


async def fallocate(image: Image, mode: int, offset: int, size: int) -> None:
    """fallocate(2) on the raw file. Bytes; `mode` as there. Raises OSError; EOPNOTSUPP for what cannot be done here.

    PUNCH_HOLE and ZERO_RANGE make the range read as zeroes and give back the whole clusters in it. ZERO_RANGE past the
    end grows the image, unless KEEP_SIZE is given.

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
