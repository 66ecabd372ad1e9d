"""A host file in memory: an implementation of `storage.Storage` without a disk, but with every liberty a disk has.

Pages are immutable, so that a copy of a file (`fork`) costs a dictionary: crash enumeration makes tens of thousands.
"""

from __future__ import annotations

import errno
import os
import random
import stat
from bisect import bisect_left
from collections.abc import Sequence

import trio

from qedfuse.errors import QedfuseError
from qedfuse.host.storage import Buffer, HostExtent, find_extents, size_in_sectors

PAGE = 4096
#: What off_t holds.
MAX_SIZE = (1 << 63) - 1
_ZEROES = bytes(PAGE)


class RamFile:
    """Sparse bytes: pages of 4 KiB that exist once written, and a size. No I/O, no awaiting.

    `fixed`: it is a block device's.
    """

    def __init__(self, pages: dict[int, bytes] | None = None, size: int = 0, *, fixed: bool = False) -> None:
        self.pages: dict[int, bytes] = pages if pages is not None else {}
        self.size = size
        self.fixed = fixed

    @classmethod
    def of(cls, content: bytes | bytearray) -> RamFile:
        """A file of `content` in which pages of zeroes are holes, as cp(1) makes it."""
        pages = {at // PAGE: bytes(content[at : at + PAGE]).ljust(PAGE, b"\0") for at in range(0, len(content), PAGE)}
        return cls({index: page for index, page in pages.items() if page != _ZEROES}, len(content))

    def fork(self) -> RamFile:
        return RamFile(self.pages.copy(), self.size, fixed=self.fixed)

    def key(self) -> tuple[int, frozenset[tuple[int, bytes]]]:
        """Equal for files of equal layout and content (bytes objects remember their hash)."""
        return self.size, frozenset(self.pages.items())

    def read(self, offset: int, size: int) -> bytes:
        """As pread(2): short at the end of the file."""
        size = max(0, min(size, self.size - offset))
        first, skip = divmod(offset, PAGE)
        last = -(-(offset + size) // PAGE)
        pages = self.pages
        if last - first == 1:
            return pages.get(first, _ZEROES)[skip : skip + size]
        return b"".join([pages.get(index, _ZEROES) for index in range(first, last)])[skip : skip + size]

    def write(self, offset: int, data: bytes) -> None:
        position = 0
        while position < len(data):
            index, skip = divmod(offset + position, PAGE)
            part = data[position : position + PAGE - skip]
            if len(part) < PAGE:
                old = self.pages.get(index, _ZEROES)
                part = old[:skip] + part + old[skip + len(part) :]
                position += PAGE - skip
            else:
                position += PAGE
            self.pages[index] = part
        self.size = max(self.size, offset + len(data))

    def truncate(self, size: int) -> None:
        if size < self.size:
            self.punch(size, -(-self.size // PAGE) * PAGE - size)  # the last page goes whole
        self.size = size

    def punch(self, offset: int, size: int) -> None:
        first, last = -(-offset // PAGE), (offset + size) // PAGE
        if first > last:
            edges = [(offset, offset + size)]
        else:
            edges = [(offset, first * PAGE), (last * PAGE, offset + size)]
        for start, end in edges:
            index = start // PAGE
            if start < end and index in self.pages:
                old = self.pages[index]
                self.pages[index] = old[: start - index * PAGE] + bytes(end - start) + old[end - index * PAGE :]
        if last - first > len(self.pages):
            for index in [index for index in self.pages if first <= index < last]:
                del self.pages[index]
        else:
            for index in range(first, last):
                self.pages.pop(index, None)


class Chaos:
    """What the scheduler and the page cache may do: refuse to answer on the spot, let other tasks run, split a write
    where sectors end.

    `refuse` and `split` are probabilities; each await lets the others run 0 to `yields` times (`read_yields` when
    reading).
    """

    def __init__(
        self, seed: int, *, refuse: float = 0.5, yields: int = 3, split: float = 0.3, read_yields: int | None = None
    ) -> None:
        self.random = random.Random(seed)
        self.refuse = refuse
        self.yields = yields
        self.split = split
        self.read_yields = yields if read_yields is None else read_yields

    def refuses(self) -> bool:
        return self.random.random() < self.refuse

    async def pause(self, yields: int | None = None) -> None:
        for _ in range(self.random.randint(0, self.yields if yields is None else yields)):
            await trio.lowlevel.checkpoint()


class RamStorage:
    """See `storage.Storage`. Without `chaos` nothing ever waits. `punches`: whether punching frees space, or only
    writes zeroes as on a file system that cannot."""

    def __init__(
        self,
        path: str = "ram",
        file: RamFile | None = None,
        *,
        writable: bool = True,
        chaos: Chaos | None = None,
        punches: bool = True,
    ) -> None:
        self.path = path
        self.writable = writable
        self.file = file if file is not None else RamFile()
        self.fixed = self.file.fixed
        self.chaos = chaos
        self.punches = punches
        self.closed = False
        self.syncs = 0

    # -- what subclasses hook into ------------------------------------------------------------------------------------

    def apply_write(self, offset: int, data: bytes) -> None:
        self.file.write(offset, data)

    def apply_truncate(self, size: int) -> None:
        self.file.truncate(size)

    def apply_punch(self, offset: int, size: int) -> None:
        if self.punches:
            self.file.punch(offset, size)
        else:
            self.file.write(offset, bytes(size))

    # -- Storage ------------------------------------------------------------------------------------------------------

    def _check(self, writing: bool = False, end: int = 0) -> None:
        """`end`: up to where the call is going to write."""
        if self.closed or (writing and not self.writable):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if end > MAX_SIZE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    def read_into_nowait(self, offset: int, target: memoryview) -> bool:
        self._check()
        if self.chaos and self.chaos.refuses():
            target[:] = b"\xee" * len(target)  # nothing is promised
            return False
        data = self.file.read(offset, len(target))
        target[: len(data)] = data
        return len(data) == len(target)

    async def read_into(self, offset: int, target: memoryview) -> None:
        self._check()
        if self.chaos:
            await self.chaos.pause(self.chaos.read_yields)
        data = self.file.read(offset, len(target))
        target[: len(data)] = data
        if offset + len(target) > size_in_sectors(self):
            raise QedfuseError(self.path, f"unexpected end of file at {offset + len(data)}", errno.EIO)
        target[len(data) :] = bytes(len(target) - len(data))
        if self.chaos:
            await self.chaos.pause(self.chaos.read_yields)

    def _check_end(self, end: int) -> None:
        if self.fixed and end > self.file.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self._check(True, offset + len(data))
        self._check_end(offset + len(data))
        if self.chaos and self.chaos.refuses():
            return False
        self.apply_write(offset, bytes(data))
        return True

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        self._check(True, offset + len(data))
        self._check_end(offset + len(data))
        if self.chaos is None:
            self.apply_write(offset, data)
            return
        await self.chaos.pause()
        while data:
            size = len(data)
            if self.chaos.random.random() < self.chaos.split:
                end = self.chaos.random.randint(offset + 1, offset + size)
                size = min(size, -(-end // 512) * 512 - offset)
            self.apply_write(offset, data[:size])
            offset += size
            data = data[size:]
            await self.chaos.pause()

    def write_behind(self, offset: int, size: int) -> None:
        pass

    async def sync(self) -> None:
        self._check()
        if self.chaos:
            await self.chaos.pause()
        self.syncs += 1

    async def truncate(self, size: int) -> None:
        self._check(True, size)
        if self.fixed:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if self.chaos:
            await self.chaos.pause()
        self.apply_truncate(size)
        if self.chaos:
            await self.chaos.pause()

    async def reserve(self, offset: int, size: int) -> None:
        if offset + size > self.file.size:
            await self.truncate(offset + size)

    async def punch(self, offset: int, size: int) -> None:
        self._check(True)
        if self.chaos:
            await self.chaos.pause()
        self.apply_punch(offset, size)
        if self.chaos:
            await self.chaos.pause()

    async def deallocate(self, runs: Sequence[tuple[int, int]]) -> bool:
        if not self.punches:
            return False
        for run in runs:
            await self.punch(*run)
        return True

    def size(self) -> int:
        self._check()
        return self.file.size

    def stat(self) -> os.stat_result:
        self._check()
        number = id(self.file)  # one file, one number
        fields = (stat.S_IFREG | 0o644, number, 1, 1, 0, 0, self.file.size, 0, 0, 0)
        if self.fixed:
            return os.stat_result((stat.S_IFBLK | 0o644, 1, 1, 1, 0, 0, 0, 0, 0, 0), {"st_blocks": 0, "st_rdev": 1792})
        return os.stat_result(fields, {"st_blocks": len(self.file.pages) * PAGE // 512, "st_blksize": PAGE})

    def next_data(self, offset: int) -> int | None:
        self._check()
        if offset >= self.file.size:
            return None
        if self.fixed:
            return offset
        indices = sorted(self.file.pages)
        position = bisect_left(indices, offset // PAGE)
        if position == len(indices) or indices[position] * PAGE >= self.file.size:
            return None
        return max(offset, indices[position] * PAGE)

    def next_hole(self, offset: int) -> int:
        self._check()
        if offset >= self.file.size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        if self.fixed:
            return self.file.size
        index = offset // PAGE
        while index in self.file.pages:
            index += 1
        return min(max(offset, index * PAGE), self.file.size)

    async def find_extents(self, ranges: Sequence[tuple[int, int]], most: int) -> list[HostExtent]:
        return find_extents(self, ranges, most)

    async def close(self) -> None:
        self.closed = True
