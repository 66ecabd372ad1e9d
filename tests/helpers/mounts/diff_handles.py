"""The ways in which a process has a raw file open, each opened when it is first needed. None of them can kill it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat

FLAGS = {
    "plain": os.O_RDWR,
    "direct": os.O_RDWR | os.O_DIRECT,
    "dsync": os.O_RDWR | os.O_DSYNC,
    "append": os.O_RDWR | os.O_APPEND,
    "reader": os.O_RDONLY,
}

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16

_libc = ctypes.CDLL(None, use_errno=True)


class Handles:
    """A map is stored into and read by system calls from a buffer: a page that cannot be had is EFAULT, not SIGBUS.

    A loop device has a page cache of its own, apart from its file's. Readahead fills it with folios of many pages (seen
    with Linux 6.18), and after a store into one page all of its folio is written to the file, whatever that is: what
    others have written there meanwhile is undone. So no handle of a block device reads ahead, and a folio there is one
    page, or several that one write has filled.
    """

    def __init__(self, path: str, tail: int, source: str | None) -> None:
        self._path = path
        self._is_device = stat.S_ISBLK(os.stat(path).st_mode)
        self._source = source
        self._tail = tail
        self._fds: dict[str, int] = {}
        self._map: mmap.mmap | None = None
        self._buffer = os.memfd_create("buffer")

    def fd(self, kind: str) -> int:
        if kind not in self._fds:
            if kind == "source":
                assert self._source is not None
                self._fds[kind] = os.open(self._source, os.O_RDONLY)
            else:
                self._fds[kind] = os.open(self._path, FLAGS[kind])
                if self._is_device:
                    os.posix_fadvise(self._fds[kind], 0, 0, os.POSIX_FADV_RANDOM)
        return self._fds[kind]

    def open_all(self) -> None:
        """For when the name will soon be another file's."""
        for kind in (*FLAGS, "source") if self._source else FLAGS:
            self.fd(kind)

    def close(self, kind: str) -> None:
        if kind in self._fds:
            os.close(self._fds.pop(kind))

    def close_all(self) -> None:
        """close(2) may say that something was lost; all are closed first."""
        self.unmap()
        errors = []
        for kind in list(self._fds):
            try:
                self.close(kind)
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    # -- plain and direct ---------------------------------------------------------------------------------------------

    def pread(self, kind: str, offset: int, size: int) -> bytes:
        """All of it, or as much as there is before the end. `direct` takes aligned memory."""
        with mmap.mmap(-1, max(size, 1)) as buffer, memoryview(buffer) as view:
            done = 0
            while done < size:
                with view[done:size] as rest:
                    count = os.preadv(self.fd(kind), [rest], offset + done)
                if not count:
                    break
                done += count
                if kind == "direct" and done % 512:  # the end
                    break
            return bytes(view[:done])

    def pwrite(self, kind: str, offset: int, data: bytes, flags: int = 0) -> None:
        with mmap.mmap(-1, len(data)) as buffer, memoryview(buffer) as view:
            view[:] = data
            done = 0
            while done < len(data):  # a short write comes before an error
                with view[done:] as rest:
                    done += os.pwritev(self.fd(kind), [rest], offset + done, flags)

    # -- the map ------------------------------------------------------------------------------------------------------

    def unmap(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    def _mapped(self, end: int) -> mmap.mmap:
        if self._map is None or len(self._map) < end:
            self.unmap()
            self._map = mmap.mmap(self.fd("plain"), max(end, self._tail))  # further on it may end any time
            if self._is_device:
                self._map.madvise(mmap.MADV_RANDOM)
        return self._map

    def store(self, offset: int, data: bytes) -> None:
        with memoryview(self._mapped(offset + len(data))) as view, view[offset : offset + len(data)] as place:
            os.pwrite(self._buffer, data, 0)
            if os.preadv(self._buffer, [place], 0) != len(data):
                raise OSError(errno.EFAULT, "a page is not there")

    def load(self, offset: int, size: int) -> bytes:
        with memoryview(self._mapped(offset + size)) as view, view[offset : offset + size] as place:
            if os.pwritev(self._buffer, [place], 0) != size:
                raise OSError(errno.EFAULT, "a page is not there")
        return os.pread(self._buffer, size, 0)

    def msync(self, offset: int, end: int) -> None:
        """Of whole pages."""
        start = offset - offset % mmap.PAGESIZE
        self._mapped(end).flush(start, end - start)

    # -- copies within the kernel -------------------------------------------------------------------------------------

    def copy(self, source: int, target: int, size: int, *, other: bool = False, sendfile: bool = False) -> None:
        """copy_file_range(2) or sendfile(2), from the file itself or from the other one."""
        fd = self.fd("source" if other else "plain")
        done = 0
        os.lseek(self.fd("plain"), target, os.SEEK_SET)
        while done < size:
            if sendfile:
                count = os.sendfile(self.fd("plain"), fd, source + done, size - done)
            else:
                count = os.copy_file_range(fd, self.fd("plain"), size - done, source + done, target + done)
            if not count:
                raise OSError(errno.EIO, "a copy stops early")
            done += count

    def send(self, offset: int, data: bytes) -> None:
        """sendfile(2) into the file."""
        os.pwrite(self._buffer, data, 0)
        os.lseek(self.fd("plain"), offset, os.SEEK_SET)
        done = 0
        while done < len(data):
            done += os.sendfile(self.fd("plain"), self._buffer, done, len(data) - done)

    def receive(self, offset: int, size: int) -> bytes:
        """sendfile(2) out of the file."""
        os.lseek(self._buffer, 0, os.SEEK_SET)
        done = 0
        while done < size:
            count = os.sendfile(self._buffer, self.fd("plain"), offset + done, size - done)
            if not count:
                break
            done += count
        return os.pread(self._buffer, done, 0)

    def fallocate(self, mode: int, offset: int, size: int) -> None:
        if _libc.fallocate64(self.fd("plain"), mode, ctypes.c_int64(offset), ctypes.c_int64(size)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
