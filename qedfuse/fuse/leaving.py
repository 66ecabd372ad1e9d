"""How the file of an image is left when the image is closed.

It gets the time of change that the kernel wants it to have, which closing would move, and the state in which it is then
is remembered: a later look at the file tells by that whether another process has changed it since, and whether the
pages that the kernel has cached still show what it says.

A descriptor of ours is kept for that. It holds the image's lock: no other process changes the file before it is left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import trio

from qedfuse.fuse.page_cache import TICK, CachedPages
from qedfuse.host import image_lock
from qedfuse.host.file_id import FileMark
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.lookups import look
from qedfuse.qed.image import Image
from qedfuse.text import describe

T = TypeVar("T")

_log = logging.getLogger("qedfuse")


class LeftFile:
    """An image's file as we have left it.

    `mtime_ns`: the time of change that the kernel wants the file to have (nanoseconds); None: as it is. `mark`, `size`
    and `left_at`: the file's state after it was last changed or put there by us, the image's size (bytes), and when
    that was (`time.monotonic`). `mark` is None if that was never. `cached`: what the kernel may have cached of it.
    """

    __slots__ = ("_cached", "left_at", "mark", "mtime_ns", "size")

    def __init__(self, cached: CachedPages) -> None:
        self.mark: FileMark | None = None
        self.size = 0
        self.left_at = 0.0
        self.mtime_ns: int | None = None
        self._cached = cached

    def note(self, status: os.stat_result) -> None:
        """The file is in a state to which we have brought it."""
        self.mark = FileMark.of(status)
        self._cached.note_own_change(status)
        self.left_at = time.monotonic()

    def keep_descriptor(self, image: Image, *, ending: bool) -> int | None:
        """One for `leave`, if it matters how the file is left of this image, which is about to be closed. Without one,
        the file counts as changed by others. `ending`: there will be no later look."""
        matters = self.mtime_ns is not None or not ending
        if matters and isinstance(image.storage, FileStorage) and image.writable:
            with contextlib.suppress(OSError):  # no descriptor left
                return image.storage.lend()
        return None

    async def leave(self, fd: int, path: str, *, local: bool, ending: trio.Event) -> None:
        """The image is closed. The descriptor is used up. `local`: the file's host cannot fail to answer. What fails is
        logged, with `path`."""

        async def call(function: Callable[[], T]) -> T:
            return function() if local else await look(function)

        try:
            status = await call(partial(self._set_times, fd))
            if not ending.is_set():  # until a change would show
                await trio.sleep(min(max(0, status.st_ctime_ns + TICK - time.time_ns()), TICK) / 1e9)
            self.note(status)
        except OSError as error:
            _log.warning("%s", describe(error, path))
        finally:
            with contextlib.suppress(OSError):
                await call(partial(image_lock.close, fd))

    def _set_times(self, fd: int) -> os.stat_result:
        status = os.fstat(fd)
        if self.mtime_ns is not None and self.mtime_ns != status.st_mtime_ns:
            os.utime(fd, ns=(status.st_atime_ns, self.mtime_ns))
            status = os.fstat(fd)
        return status
