"""Requests that the fast path hands over to Python past pyfuse3.

FALLOCATE and LSEEK, for which pyfuse3 has no handlers, and what is quicker this way: FSYNC, whose commit is carried out
on the spot if the disk is fast and nobody else wants anything, READs for which C has waited in vain for the disk.

Source: linux/fuse.h.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TypeVarTuple, Unpack

import trio

from qedfuse.fuse.complaints import Complaints
from qedfuse.fuse.fallocate import fallocate
from qedfuse.fuse.last_seek import LastSegments
from qedfuse.fuse.replaced import check_not_replaced, may_be_replaced
from qedfuse.host.lookups import abandonable
from qedfuse.host.stepping import Stepper
from qedfuse.host.storage import Buffer
from qedfuse.layers.seek import find_segments
from qedfuse.qed.image import Image

Ts = TypeVarTuple("Ts")

_READ = 15
_FSYNC = 20
_FALLOCATE = 43
_LSEEK = 46
_NOTIFY_INVAL_INODE = 2

_OUT_HEADER = struct.Struct("=IiQ")  # length, negative errno or notification, unique
_LSEEK_OUT = struct.Struct("=Q")
_INVAL_INODE_OUT = struct.Struct("=Qqq")  # inode, offset, length (0: to the end)

#: Seconds that a commit may keep the event loop from its other tasks.
_ON_THE_SPOT = 0.004
#: Seconds for which a search for a hole goes on to find what will be asked for next.
_AHEAD = 0.001

_log = logging.getLogger("qedfuse")


class HandOver:
    """The handlers. `nursery`: where they run that cannot answer on the spot; what must not be left half done there is
    shielded from its cancellation. `images`: the open ones, by handle. `has_writers`: whether the kernel may have data
    of an image that it has not written yet; None: it never has. `in_python`: see `FastPath.in_python`.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        images: Mapping[int, Image],
        has_writers: Callable[[Image], bool] | None,
        in_python: tuple[Callable[[], None], Callable[[], None]],
    ) -> None:
        self.reads = 0
        self.syncs = 0
        self._nursery = nursery
        self._images = images
        self._has_writers = has_writers
        self._enter, self._leave = in_python
        self._complaints = Complaints()
        self._last = LastSegments()
        # Threads of their own, by inode: what they wait for may need one of trio's, and may never come.
        self._write_backs: dict[int, trio.CapacityLimiter] = {}

    def answer(
        self, fd: int, opcode: int, unique: int, node: int, fh: int, offset: int, length: int, mode: int
    ) -> bool:
        """A request, from C, in the middle of a system call of pyfuse3's. Returns whether it has been answered; if not,
        a task will do it."""
        image = self._images[fh]
        if opcode == _FSYNC:
            return self._sync(fd, unique, image)
        if opcode == _LSEEK and self._seek_known(fd, unique, image, offset, mode):
            return True
        if opcode == _READ:
            self._begin(self._read, fd, unique, image, offset, length)
        elif opcode == _FALLOCATE:
            self._begin(self._fallocate, fd, unique, image, mode, offset, length)
        else:
            self._begin(self._answer_seek, fd, unique, image, node, offset, mode)
        return False

    def _begin(self, handler: Callable[[Unpack[Ts]], Awaitable[None]], *args: *Ts) -> None:
        """As a task. It runs to its first wait even when all are cancelled."""
        self._enter()
        self._nursery.start_soon(self._run, handler, args)

    async def _run(self, handler: Callable[[Unpack[Ts]], Awaitable[None]], args: tuple[*Ts]) -> None:
        try:
            await handler(*args)
        finally:
            self._leave()

    # -- READ ---------------------------------------------------------------------------------------------------------

    async def _read(self, fd: int, unique: int, image: Image, offset: int, size: int) -> None:
        try:
            data = await image.read(offset, size)
        except Exception as error:
            _send(fd, self._complaints.errno_of(error, "read"), unique)
        else:
            self.reads += 1
            _send(fd, 0, unique, data)

    # -- FSYNC --------------------------------------------------------------------------------------------------------

    def _sync(self, fd: int, unique: int, image: Image) -> bool:
        """The commit, a system call at a time, for as long as each is done in a moment (see `offload.py`), and all of
        them in a few: after writes that failed there may be thousands of clusters to punch."""
        self.syncs += 1
        end = time.monotonic() + _ON_THE_SPOT
        try:
            flush = None if may_be_replaced(image) else image.begin_flush()
            if flush is None:
                self._begin(self._flush, fd, unique, image)
                return False
            stepper = Stepper(flush)
            if not stepper.run_inline(end):
                self._begin(self._finish_flush, fd, unique, stepper)
                return False
        except Exception as error:
            _send(fd, self._complaints.errno_of(error, "fsync"), unique)
        else:
            _send(fd, 0, unique)
        return True

    async def _finish_flush(self, fd: int, unique: int, stepper: Stepper) -> None:
        code = 0
        try:
            await stepper.finish()
        except Exception as error:
            code = self._complaints.errno_of(error, "fsync")
        _send(fd, code, unique)

    async def _flush(self, fd: int, unique: int, image: Image) -> None:
        code = 0
        try:
            await image.flush()
            await check_not_replaced(image)
        except Exception as error:
            code = self._complaints.errno_of(error, "fsync")
        _send(fd, code, unique)

    # -- FALLOCATE, LSEEK ---------------------------------------------------------------------------------------------

    async def _fallocate(self, fd: int, unique: int, image: Image, mode: int, offset: int, length: int) -> None:
        code = 0
        try:
            await fallocate(image, mode, offset, length)
        except Exception as error:
            code = _errno_of(error, image)
        _send(fd, code, unique)

    def _seek_known(self, fd: int, unique: int, image: Image, offset: int, whence: int) -> bool:
        """Answer an LSEEK from what the one before has found."""
        if self._is_cached(image):
            return False
        found = self._last.seek(image, offset, data=whence == os.SEEK_DATA)
        if found is None:
            return False
        if found == image.size and whence == os.SEEK_DATA:
            _send(fd, errno.ENXIO, unique)
        else:
            _send(fd, 0, unique, _LSEEK_OUT.pack(found))
        return True

    async def _answer_seek(self, fd: int, unique: int, image: Image, node: int, offset: int, whence: int) -> None:
        try:
            found = await self._seek(fd, image, node, offset, whence)
        except Exception as error:
            _send(fd, _errno_of(error, image), unique)
        else:
            _send(fd, 0, unique, _LSEEK_OUT.pack(found))

    async def _seek(self, fd: int, image: Image, node: int, offset: int, whence: int) -> int:
        """Where the data or the hole is, once the kernel has handed out the data that it may still have for a hole.

        The kernel does not do that itself before it asks. Nothing can be written meanwhile but through mmap: it holds
        the file's lock. With nobody left who can write, it has handed out everything: it does so before it tells us of
        a close.
        """
        written_back = -1
        to_data = whence == os.SEEK_DATA
        while True:
            segments = self._last.find(image, offset, data=to_data)
            if segments is None:
                version = image.version
                segments = await find_segments(image, offset, data=to_data, ahead=_AHEAD)
                self._last.note(image, version, segments)
            if to_data and segments.is_data:
                return offset
            if self._is_cached(image):
                hole, *rest = (offset, *segments.ends)[segments.is_data :]
                if hole != written_back:
                    await self._write_back(fd, node, hole, rest[0] - hole if rest and rest[0] < image.size else 0)
                    written_back = hole
                    continue
            found = segments.seek(offset, data=to_data)
            if found is None or (to_data and found == image.size):
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            return found

    def _is_cached(self, image: Image) -> bool:
        """Whether the kernel may have data of it that we have not."""
        return self._has_writers is not None and self._has_writers(image)

    async def _write_back(self, fd: int, node: int, offset: int, length: int) -> None:
        """Let the kernel write what it has for a range of a file, and forget it. The writes are served meanwhile; when
        nobody serves them any more, a cancellation does not wait."""
        data = _INVAL_INODE_OUT.pack(node, offset, length)
        message = _OUT_HEADER.pack(_OUT_HEADER.size + len(data), _NOTIFY_INVAL_INODE, 0) + data
        limiter = self._write_backs.setdefault(node, trio.CapacityLimiter(1))
        try:
            await abandonable(partial(os.write, fd, message), limiter)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the kernel has forgotten the file: it has nothing
                raise
        finally:
            if not limiter.borrowed_tokens:
                self._write_backs.pop(node, None)


def _errno_of(error: Exception, image: Image) -> int:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    _log.error("%s: internal error: %r", image.path, error, exc_info=error)
    return errno.EIO


def _send(fd: int, code: int, unique: int, data: Buffer = b"") -> None:
    """Reply to the kernel."""
    try:
        os.writev(fd, [_OUT_HEADER.pack(_OUT_HEADER.size + len(data), -code, unique), data])
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits any more; unmounted
            _log.error("cannot reply to the kernel: %s", error.strerror)
