"""Requests that the fast path hands over to Python past pyfuse3: one method for each kind.

FALLOCATE and LSEEK, for which pyfuse3 has no handlers, OPEN, for which it lacks a flag, and what is quicker this way:
FSYNC, whose commit is carried out inline if the disk is fast and no other task wants anything, READs for which C has
waited in vain for the disk.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Protocol, TypeVarTuple, Unpack

import trio

from qedfuse.fuse.complaints import Complaints
from qedfuse.fuse.fallocate import fallocate
from qedfuse.fuse.image_slot import ImageSlot
from qedfuse.fuse.last_seek import LastSegments
from qedfuse.fuse.orphaned import check_not_orphaned, may_be_orphaned
from qedfuse.host.lookups import abandonable
from qedfuse.host.stepping import Stepper
from qedfuse.host.storage import Buffer
from qedfuse.layers.seek import find_segments

Ts = TypeVarTuple("Ts")

#: Seconds that a commit may keep the event loop from its other tasks.
_INLINE = 0.004
#: Seconds for which a search for a hole goes on to find what will be asked for next.
_AHEAD = 0.001

_log = logging.getLogger("qedfuse")


class Request(Protocol):
    """A request of the kernel, which waits for one of the replies, once. A reply that the kernel no longer wants (its
    process is gone, or the mount) is none the worse; else they raise OSError."""

    @property
    def node(self) -> int:
        """The file's number."""

    def reply(self, error: int = 0, /) -> None:
        """It is done, or has failed with this errno."""

    def reply_data(self, data: Buffer, /) -> None:
        """To a READ: the bytes, fewer than asked for at the end of the file."""

    def reply_offset(self, offset: int, /) -> None:
        """To an LSEEK: bytes."""

    def reply_open(self, fh: int, /, *, direct: bool, keep_cache: bool) -> bool:
        """To an OPEN: the file's handle. `direct`: past the kernel's cache, and writers need not wait for each other.
        False: the process is gone, and there will be no RELEASE."""

    def invalidate(self, offset: int, size: int, /) -> None:
        """No reply: let the kernel write what it has for a range (size 0: to the end) of the file, and forget it.
        Returns when these writes have been answered, so not on the thread that answers them. Raises OSError."""


Opener = Callable[[Request, int, int], Awaitable[None]]


class HandOver:
    """The handlers. `nursery`: where they run that cannot answer inline; what must not be left half done there is
    shielded from its cancellation. `slots`: of the open files, by handle. `has_writers`: whether the kernel may have
    data of an image that it has not written yet; None: it never has. `in_python`: see `FastPath.in_python`. `opener`:
    answers an OPEN of a file by its number, with flags as of open(2).

    C calls `open`, and `read`, `fsync`, `fallocate` and `seek` for handles that are among `slots`, in the middle of a
    system call of pyfuse3's. They return whether the request has been answered; if not, a task will do it. Offsets,
    sizes: bytes.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        slots: Mapping[int, ImageSlot],
        has_writers: Callable[[ImageSlot], bool] | None,
        in_python: tuple[Callable[[], None], Callable[[], None]],
        opener: Opener,
    ) -> None:
        self._nursery = nursery
        self._slots = slots
        self._has_writers = has_writers
        self._enter, self._leave = in_python
        self._opener = opener
        self._complaints = Complaints()
        self._last = LastSegments()
        # Threads of their own, by inode: what they wait for may need one of trio's, and may never come.
        self._write_backs: dict[int, trio.CapacityLimiter] = {}

    def _begin(self, handler: Callable[[Unpack[Ts]], Awaitable[None]], *args: *Ts) -> None:
        """As a task. It runs to its first wait even when all are cancelled."""
        self._enter()
        self._nursery.start_soon(self._run, handler, args)

    async def _run(self, handler: Callable[[Unpack[Ts]], Awaitable[None]], args: tuple[*Ts]) -> None:
        try:
            await handler(*args)
        finally:
            self._leave()

    # -- OPEN ---------------------------------------------------------------------------------------------------------

    def open(self, request: Request, node: int, flags: int, /) -> bool:
        self._begin(self._opener, request, node, flags)
        return False

    # -- READ ---------------------------------------------------------------------------------------------------------

    def read(self, request: Request, fh: int, offset: int, size: int, to_end: int, /) -> bool:
        """`to_end`: past the kernel's cache, and perhaps past the image's end."""
        self._begin(self._read, request, self._slots[fh], offset, size, to_end)
        return False

    async def _read(self, request: Request, slot: ImageSlot, offset: int, size: int, to_end: int) -> None:
        try:
            if to_end and self._is_cached(slot):
                async with slot as image:
                    end = image.size
                if offset + size > end:  # where the kernel may have data, which make the file longer
                    await self._write_back(request, end, 0)
            async with slot as image:
                data = await image.read(offset, size)
        except Exception as error:
            send(request.reply, self._complaints.errno_of(error, "read"))
        else:
            send(request.reply_data, data)

    # -- FSYNC --------------------------------------------------------------------------------------------------------

    def fsync(self, request: Request, fh: int, /) -> bool:
        """The commit, a system call at a time, for as long as each is done in a moment (see `offload.py`), and all of
        them in a few: after writes that failed there may be thousands of clusters to punch."""
        slot = self._slots[fh]
        end = time.monotonic() + _INLINE
        try:
            image = slot.ready
            flush = None if image is None or may_be_orphaned(image) else image.begin_flush()
            if flush is None:
                self._begin(self._flush, request, slot)
                return False
            stepper = Stepper(flush)
            if not stepper.run_inline(end):
                slot.hold()
                self._begin(self._finish_flush, request, slot, stepper)
                return False
        except Exception as error:
            send(request.reply, self._complaints.errno_of(error, "fsync"))
        else:
            send(request.reply)
        return True

    async def _finish_flush(self, request: Request, slot: ImageSlot, stepper: Stepper) -> None:
        """`slot` is held for that."""
        code = 0
        try:
            await stepper.finish()
        except Exception as error:
            code = self._complaints.errno_of(error, "fsync")
        finally:
            slot.release()
        send(request.reply, code)

    async def _flush(self, request: Request, slot: ImageSlot) -> None:
        code = 0
        try:
            async with slot as image:
                await image.flush()
                await check_not_orphaned(image)
        except Exception as error:
            code = self._complaints.errno_of(error, "fsync")
        send(request.reply, code)

    # -- FALLOCATE, LSEEK ---------------------------------------------------------------------------------------------

    def fallocate(self, request: Request, fh: int, offset: int, size: int, mode: int, /) -> bool:
        """`mode`: as in fallocate(2)."""
        self._begin(self._fallocate, request, self._slots[fh], mode, offset, size)
        return False

    async def _fallocate(self, request: Request, slot: ImageSlot, mode: int, offset: int, size: int) -> None:
        code = 0
        try:
            async with slot as image:
                await fallocate(image, mode, offset, size)
        except Exception as error:
            code = self._complaints.errno_of(error, "fallocate", quiet=True)
        send(request.reply, code)

    def seek(self, request: Request, fh: int, offset: int, whence: int, /) -> bool:
        """`whence`: SEEK_DATA or SEEK_HOLE; the kernel does the others itself."""
        slot = self._slots[fh]
        if self._seek_known(request, slot, offset, whence):
            return True
        self._begin(self._answer_seek, request, slot, offset, whence)
        return False

    def _seek_known(self, request: Request, slot: ImageSlot, offset: int, whence: int) -> bool:
        """Answer an LSEEK from what the one before has found."""
        image = slot.ready
        if image is None or self._is_cached(slot):
            return False
        found = self._last.seek(image, offset, data=whence == os.SEEK_DATA)
        if found is None:
            return False
        if found == image.size and whence == os.SEEK_DATA:
            send(request.reply, errno.ENXIO)
        else:
            send(request.reply_offset, found)
        return True

    async def _answer_seek(self, request: Request, slot: ImageSlot, offset: int, whence: int) -> None:
        try:
            found = await self._seek(request, slot, offset, whence)
        except Exception as error:
            send(request.reply, self._complaints.errno_of(error, "seek", quiet=True))
        else:
            send(request.reply_offset, found)

    async def _seek(self, request: Request, slot: ImageSlot, offset: int, whence: int) -> int:
        """Where the data or the hole is, once the kernel has handed out the data that it may still have for a hole.

        The kernel does not do that itself before it asks. Nothing can be written meanwhile but through mmap: it holds
        the file's lock. With no handle left that can write, it has handed out everything: it does so before it tells us
        of a close. The slot is not held while the kernel writes.
        """
        written_back = -1
        to_data = whence == os.SEEK_DATA
        while True:
            async with slot as image:
                segments = self._last.find(image, offset, data=to_data)
                if segments is None:
                    version = image.version
                    segments = await find_segments(image, offset, data=to_data, ahead=_AHEAD)
                    self._last.note(image, version, segments)
                size = image.size
            if to_data and segments.is_data:
                return offset
            if self._is_cached(slot):
                hole, *rest = (offset, *segments.ends)[segments.is_data :]
                if hole != written_back:
                    await self._write_back(request, hole, rest[0] - hole if rest and rest[0] < size else 0)
                    written_back = hole
                    continue
            found = segments.seek(offset, data=to_data)
            if found is None or (to_data and found == size):
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            return found

    def _is_cached(self, slot: ImageSlot) -> bool:
        """Whether the kernel may have data of it that we have not."""
        return self._has_writers is not None and self._has_writers(slot)

    async def _write_back(self, request: Request, offset: int, size: int) -> None:
        """`Request.invalidate`, in a thread: the writes are served meanwhile, and when nothing serves them any more, a
        cancellation does not wait."""
        limiter = self._write_backs.setdefault(request.node, trio.CapacityLimiter(1))
        try:
            await abandonable(partial(request.invalidate, offset, size), limiter)
        finally:
            if not limiter.borrowed_tokens:
                self._write_backs.pop(request.node, None)


def send(reply: Callable[[Unpack[Ts]], bool | None], *args: *Ts) -> bool:
    """Reply. False: what the reply gave to the kernel it has not got."""
    try:
        return reply(*args) is not False
    except OSError as error:
        _log.error("cannot reply to the kernel: %s", error.strerror)
        return False
