"""A regular file or a block device of the host; see `storage.Storage`.

What is in the page cache is read inline (`RWF_NOWAIT`), what could block the event loop goes to a thread
(`offload.py`). EINTR is retried by Python (PEP 475), short reads and writes are continued here.

Source: preadv2(2), fallocate(2), fdatasync(2), sync_file_range(2), linux/fs.h.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar, cast

from qedfuse.errors import QedfuseError
from qedfuse.host import image_lock
from qedfuse.host.file_id import FileId
from qedfuse.host.host_call import CallKind, Host, HostCall
from qedfuse.host.storage import Buffer, HostExtent, check_type, find_extents, size_in_sectors
from qedfuse.host.waiting import in_background, in_thread
from qedfuse.sizes import round_down, round_up

if TYPE_CHECKING:
    from ctypes import CDLL

T = TypeVar("T")

#: A write of at most this many bytes is a copy into the page cache that takes less time than a thread hop.
INLINE_WRITE_LIMIT = 1 << 20

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16
_SYNC_FILE_RANGE_WRITE = 2
_BLKROGET = 0x125E
_IOV_MAX = 1024
#: A page, and no less than the blocks of nearly every device.
_DEVICE_BLOCK = 4096
#: A hole is made in steps of so many bytes: the file is locked meanwhile, and reads and writes wait.
_HOLE_STEP = 128 << 20
_MAX_SIZE = (1 << 63) - 1


class FileStorage:
    """A regular file or a block device of the host. See `storage.Storage`.

    `local`: calls that do not wait for a disk are made inline. `id`: which file it is.
    """

    local = True

    def __init__(self, path: str, fd: int, writable: bool) -> None:
        self.path = path
        self.writable = writable
        if writable:
            _libc()  # while there are descriptors to load it
        status = os.fstat(fd)
        self.fixed = stat.S_ISBLK(status.st_mode)
        self.id = FileId.of(status)
        self._fd = fd
        self._lent = False
        self._host = Host(status.st_rdev if self.fixed else status.st_dev, self.local)

    @classmethod
    def open(cls, path: str | os.PathLike[str], writable: bool, *, pin: int | None = None) -> FileStorage:
        """Open a file that exists. Never blocks on a FIFO; refuses anything but a regular file or a block device.

        `pin`: a descriptor (O_PATH) of what is at `path`, which is opened instead.
        Raises OSError with the host's errno and the path as its filename.
        """
        name = os.fspath(path)
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = os.open(name if pin is None else f"/proc/self/fd/{pin}", flags)
        except OSError as error:
            error.filename = name
            raise
        try:
            mode = os.fstat(fd).st_mode
            check_type(name, mode)
            if writable and stat.S_ISBLK(mode) and _is_read_only(fd):  # opening it has worked, writing would not
                raise QedfuseError(name, "is a read-only block device", errno.EROFS)
            return cls(name, fd, writable)
        except BaseException:
            os.close(fd)
            raise

    def fileno(self) -> int:
        """The descriptor, for locks and for the fast path. The same number for as long as the file is open."""
        return self._fd

    def lend(self) -> int:
        """A second descriptor, which has the locks until `image_lock.close`. Raises OSError."""
        fd = os.dup(self._fd)
        self._lent = True
        return fd

    def become(self, other: FileStorage) -> None:
        """Be as another opening of the same file is, from the next call on; the other one is closed. Raises OSError."""
        with suppress(OSError):  # this file system has no locks; else the other one has them
            image_lock.unlock(self._fd)  # see `image_lock.close`
        os.dup2(other._fd, self._fd, inheritable=False)
        self.writable = other.writable
        fd, other._fd = other._fd, -1
        with suppress(OSError):  # of one descriptor of two: there is nothing to lose
            os.close(fd)

    def read_into_nowait(self, offset: int, target: memoryview) -> bool:
        try:
            return os.preadv(self._fd, [target], offset, os.RWF_NOWAIT) == len(target)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # this file system has no RWF_NOWAIT
                return False
            raise self._named(error) from None

    async def read_into(self, offset: int, target: memoryview) -> None:
        await self._in_thread(self._read_all, offset, target)

    def _read_all(self, offset: int, target: memoryview) -> None:
        while len(target):
            count = os.preadv(self._fd, [target], offset)
            if count == 0:
                if offset + len(target) > size_in_sectors(self):
                    raise QedfuseError(self.path, f"unexpected end of file at {offset}", errno.EIO)
                count = len(target)
                target[:] = bytes(count)
            offset += count
            target = target[count:]

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if len(data) > INLINE_WRITE_LIMIT:
            return False
        self._write_inline(offset, [data])
        return True

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if sum(map(len, buffers)) <= INLINE_WRITE_LIMIT:
            self._write_inline(offset, buffers)
        else:
            await self._in_thread(self._write_all, offset, buffers)

    def _write_inline(self, offset: int, buffers: Sequence[Buffer]) -> None:
        try:
            self._write_all(offset, buffers)
        except OSError as error:
            raise self._named(error) from None

    def _write_all(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if len(buffers) == 1:
            count = os.pwrite(self._fd, buffers[0], offset)
            if count == len(buffers[0]):
                return
            buffers = [memoryview(buffers[0])[count:]]
            offset += count
        pending = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while pending:
            count = os.pwritev(self._fd, pending[:_IOV_MAX], offset)
            if count == 0:
                raise QedfuseError(self.path, f"wrote nothing at {offset}", errno.EIO)
            offset += count
            while pending and count >= len(pending[0]):
                count -= len(pending.pop(0))
            if count:
                pending[0] = pending[0][count:]

    def write_behind(self, offset: int, size: int) -> None:
        in_background(functools.partial(_libc().sync_file_range, self._fd, offset, size, _SYNC_FILE_RANGE_WRITE))

    async def sync(self) -> None:
        await self._wait_for(HostCall(self._host, os.fdatasync, (self._fd,), CallKind.SYNC))

    async def truncate(self, size: int) -> None:
        if size > _MAX_SIZE:  # more than off_t holds: no OSError by itself
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), self.path)
        await self._in_thread(self._truncate, size)

    def _truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    async def reserve(self, offset: int, size: int) -> None:
        if size:
            await self._in_thread(self._reserve, offset, size)

    def _reserve(self, offset: int, size: int) -> None:
        if not self._attempt(0, offset, size) and self.size() < offset + size:
            self._truncate(offset + size)

    async def punch(self, offset: int, size: int) -> None:
        await self._in_thread(self._punch, offset, size)

    def _punch(self, offset: int, size: int) -> None:
        # A device takes whole blocks only.
        block = _DEVICE_BLOCK if self.fixed else 1
        start, end = round_up(offset, block), round_down(offset + size, block)
        if start < end and self._deallocate(start, end - start):
            self._write_zeroes(offset, start - offset)
            self._write_zeroes(end, offset + size - end)
        else:
            self._write_zeroes(offset, size)

    async def deallocate(self, runs: Sequence[tuple[int, int]]) -> bool:
        return await self._in_thread(self._deallocate_all, runs)

    def _deallocate_all(self, runs: Sequence[tuple[int, int]]) -> bool:
        for offset, size in runs:
            for start in range(offset, offset + size, _HOLE_STEP):
                length = min(offset + size - start, _HOLE_STEP)
                if self._deallocate(start, length):
                    continue
                if not self.fixed:
                    return False
                self._write_zeroes(start, length)  # it has nothing to deallocate
        return True

    def _deallocate(self, offset: int, size: int) -> bool:
        """Zeroes without writing them; what a device cannot discard the kernel can overwrite, unless its pages are
        busy. False: the file system, or the device, can't."""
        modes = (FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE) if self.fixed else (FALLOC_FL_PUNCH_HOLE,)
        return any(self._attempt(mode, offset, size) for mode in modes)

    def _attempt(self, mode: int, offset: int, size: int) -> bool:
        """fallocate(2); only mode 0 changes the size. False: the file system, or the device, can't."""
        try:
            _fallocate(self._fd, mode | (FALLOC_FL_KEEP_SIZE if mode else 0), offset, size)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                return False
            if self.fixed and error.errno in (errno.EINVAL, errno.EBUSY):  # larger blocks; mounted, or open exclusively
                return False
            raise
        return True

    def _write_zeroes(self, offset: int, size: int) -> None:
        zeroes = bytes(min(size, 1 << 20))
        for start in range(offset, offset + size, len(zeroes) or 1):
            self._write_all(start, [zeroes[: offset + size - start]])

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return cast(T, await self._wait_for(HostCall(self._host, function, args)))

    async def _wait_for(self, call: HostCall) -> object:
        try:
            return await in_thread(call)
        except OSError as error:
            raise self._named(error) from None

    def _named(self, error: OSError) -> OSError:
        """An error of a call by descriptor, with the file's name."""
        if error.filename is None and not isinstance(error, QedfuseError):
            error.filename = self.path
        return error

    def size(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END) if self.fixed else os.fstat(self._fd).st_size

    def stat(self) -> os.stat_result:
        return os.fstat(self._fd)

    async def refresh(self) -> None:
        """Have `stat` and `size` tell what is true now."""

    async def statvfs(self) -> os.statvfs_result:
        """The space of the file system."""
        return os.fstatvfs(self._fd)

    def next_data(self, offset: int) -> int | None:
        if self.fixed:
            return offset if offset < self.size() else None
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise

    def next_hole(self, offset: int) -> int:
        if not self.fixed:
            return os.lseek(self._fd, offset, os.SEEK_HOLE)
        size = self.size()
        if offset >= size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), self.path)
        return size

    async def find_extents(self, ranges: Sequence[tuple[int, int]], most: int) -> list[HostExtent]:
        if self.fixed:
            return find_extents(self, ranges, most)
        return await self._in_thread(find_extents, self, ranges, most)

    async def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1  # a late call gets EBADF, not another file
            await self._in_thread(os.close if self._lent else image_lock.close, fd)


@functools.cache
def _libc() -> CDLL:
    """For calls that the os module lacks; musl has no fallocate64, but its off_t is 64 bits anyway. Not loaded for what
    is only read: that takes longer than a look at a header."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return libc


def _is_read_only(fd: int) -> bool:
    """Whether a block device refuses writes."""
    answer = bytearray(4)
    with suppress(OSError):
        fcntl.ioctl(fd, _BLKROGET, answer)
    return any(answer)


def _fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    from ctypes import get_errno

    while _libc().fallocate64(fd, mode, offset, size) != 0:
        code = get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
