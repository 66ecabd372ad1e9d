"""The only way to a host file, as everything above sees it: asynchronous protocols, to read one and to write it.

The real file is in `file_storage.py`; tests plug in RAM, faults and a crash log. What is cached is done inline
(`*_nowait`), what could block the event loop goes to a thread. Callers see all of a transfer or an OSError.

A file counts as long as its sectors of 512 bytes, as it does for QEMU (`sizes.whole_sectors`): what the last one
lacks reads as zeroes.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from qedfuse.errors import QedfuseError
from qedfuse.sizes import whole_sectors

Buffer = bytes | bytearray | memoryview

#: Behind every file.
_END = 1 << 63


def check_type(path: str, mode: int) -> None:
    """Raise an OSError if what has this `st_mode` can be no image: QedfuseError, EISDIR or EINVAL."""
    if stat.S_ISDIR(mode):
        raise QedfuseError(path, "is a directory, not an image", errno.EISDIR)
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise QedfuseError(path, "is not a regular file or a block device", errno.EINVAL)


class HostExtent(NamedTuple):
    """Bytes of a host file that are data, or a hole."""

    start: int
    end: int
    is_data: bool


class ReadStorage(Protocol):
    """A host file that is read: of a layer below, it is all that is asked.

    Offsets and sizes are bytes. Errors are OSErrors with the host's errno. A call that was cancelled has either
    happened whole or, for a write, may have happened in part. `fixed`: a block device. Its size cannot be changed, all
    of it counts as data, and what was never written may be anything.
    """

    path: str
    fixed: bool

    def size(self) -> int:
        """How long the file is, or how large the device."""
        ...

    def read_into_nowait(self, offset: int, target: memoryview) -> bool:
        """Fill `target` from `offset` if that needs no waiting. False: nothing is promised of target's content."""
        ...

    async def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` from `offset`; what the file's last sector lacks is zeroes. Raises EIO if it ends before."""
        ...

    def stat(self) -> os.stat_result:
        """The file's attributes (times, owner, st_blocks); of a block device those of its node."""
        ...

    def next_data(self, offset: int) -> int | None:
        """The first offset at or behind `offset` that holds data, None if there is none before the end of the file."""
        ...

    def next_hole(self, offset: int) -> int:
        """The first offset at or behind `offset` that holds none (the end of the file counts as one)."""
        ...

    async def find_extents(self, ranges: Sequence[tuple[int, int]], most: int) -> list[HostExtent]:
        """What is data and what are holes in ranges (start, end), sorted and not empty: in each from its start on, and
        not more than `most` extents, at least one. An extent may begin before a range that it covers, and end behind
        it. What is only reserved (unwritten) counts as the file system says."""
        ...

    async def close(self) -> None:
        """Release the file. Idempotent; makes nothing durable."""
        ...


class Storage(ReadStorage, Protocol):
    """A host file that is written, too, if it is `writable`."""

    writable: bool

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Write all of `data` at `offset` inline (into the page cache). False: not done at all, use `write`."""
        ...

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write the buffers one behind the other at `offset`, whole or with an OSError."""
        ...

    def write_behind(self, offset: int, size: int) -> None:
        """Have the host begin to bring this range to the disk. A hint: returns at once, promises and raises nothing."""
        ...

    async def sync(self) -> None:
        """fdatasync: all completed writes, punches and size changes are durable when this returns."""
        ...

    async def truncate(self, size: int) -> None:
        """Set the file's size; what is added reads as zeroes."""
        ...

    async def reserve(self, offset: int, size: int) -> None:
        """See to it that writes to this range will find room; the file grows to its end, and what was not there before
        reads as zeroes. Where the file system cannot promise that, the file only grows. Raises OSError, ENOSPC; the
        file may have grown then."""
        ...

    async def punch(self, offset: int, size: int) -> None:
        """Make a range inside the file read as zeroes and deallocate it where the file system can."""
        ...

    async def deallocate(self, runs: Sequence[tuple[int, int]]) -> bool:
        """Make runs (offset, size) inside the file read as zeroes by deallocating them. False: that cannot be
        done, and some of them may be as they were. A device has nothing to deallocate: zeroes are written there."""
        ...


async def fill(storage: ReadStorage, offset: int, target: memoryview) -> None:
    """As `ReadStorage.read_into`, inline if that needs no waiting."""
    if not storage.read_into_nowait(offset, target):
        await storage.read_into(offset, target)


async def read(storage: ReadStorage, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`; see `fill`."""
    buffer = bytearray(size)
    with memoryview(buffer) as target:
        await fill(storage, offset, target)
    return bytes(buffer)


def find_extents(storage: ReadStorage, ranges: Sequence[tuple[int, int]], most: int) -> list[HostExtent]:
    """See `ReadStorage.find_extents`; with one call for an extent, as a rule, inline. All is data where the file
    system does not tell."""
    found: list[HostExtent] = []
    position = -1  # up to where all is known since the start of the range before
    for start, end in ranges:
        is_data: bool | None = None
        position = max(position, start)
        for _ in range(most):
            if position >= end:
                break
            extent = _extent_at(storage, position, is_data)
            found.append(extent)
            position, is_data = extent.end, not extent.is_data
    return found


def _extent_at(storage: ReadStorage, position: int, is_data: bool | None) -> HostExtent:
    """`is_data`: what is there, as far as that has been told; but the file may change meanwhile."""
    try:
        if not is_data:
            data = storage.next_data(position)
            if data is None:
                return HostExtent(position, _END, False)
            if data > position:
                return HostExtent(position, data, False)
        return HostExtent(position, max(storage.next_hole(position), position + 1), True)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return HostExtent(position, _END, False)
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return HostExtent(position, _END, True)
        raise


def held_bytes(storage: ReadStorage) -> int:
    """Bytes that the host stores for a file; of a device, all."""
    return storage.size() if storage.fixed else storage.stat().st_blocks * 512


def size_in_sectors(storage: ReadStorage) -> int:
    """The file's size in bytes, rounded up to whole sectors: up to there it can be read."""
    return whole_sectors(storage.size())
