"""One image of a mount: opened when first used, closed a little after its last use.

An image is opened and closed by one task (`_keep`), as `open_image` demands; users count themselves in and out. The
lock is held while the image is being opened or closed, so that nobody uses it halfway, and a new user waits for the
close to end (the image's own lock would refuse him before).

Closing throws away what is in memory, so it comes after a flush that has succeeded. While the host has no space for
what was written the image stays open, for the next user as well, and the flush is tried again. An image whose sync has
failed stays open, too, until the mount ends: opened again, it would not know of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from errno import EACCES, EPERM, EROFS
from typing import Any

import trio

from qedfuse.errors import InUseError, QedfuseError, describe
from qedfuse.image import Image
from qedfuse.pagecache import TICK, CachedPages
from qedfuse.peek import FileKey, FileMark, key_of, mark_of
from qedfuse.storage import FileStorage

#: (path, read_only) -> an open image
Opener = Callable[[str, bool], AbstractAsyncContextManager[Image]]

#: Seconds until what could not be written is tried again, at first and at most.
_FIRST_PAUSE = 0.5
_LAST_PAUSE = 4.0

_log = logging.getLogger("qedfuse")


class MountedImage:
    """An image that is open while somebody uses it, and `linger` seconds longer.

    `read_only`: never opened for writing. `path`: where it is opened; may be changed, for a file that was renamed.
    `opened`: the image while it is open. `failure`: why the last close failed. `unwritten`: why it cannot be closed
    yet. `mtime_ns`: the time of change that the kernel wants the file to have; closing keeps it (nanoseconds). `mark`,
    `size` and `closed_at`: the file's state after it was last open for writing, the image's size (bytes), and when that
    was (`time.monotonic`). `cached`: what the kernel may have cached of it.
    """

    __slots__ = (
        "_closed",
        "_given_up",
        "_idle",
        "_keeping",
        "_linger",
        "_lock",
        "_nursery",
        "_open",
        "_shared",
        "_stop",
        "_users",
        "_wake",
        "cached",
        "closed_at",
        "failure",
        "mark",
        "mtime_ns",
        "opened",
        "path",
        "read_only",
        "size",
        "unwritten",
    )

    def __init__(self, path: str, opener: Opener, nursery: trio.Nursery, *, read_only: bool, linger: float) -> None:
        self.path = path
        self.read_only = read_only
        self.opened: Image | None = None
        self.failure: OSError | None = None
        self.unwritten: OSError | None = None
        self.mark: FileMark | None = None
        self.size = 0
        self.cached = CachedPages()
        self.closed_at = 0.0
        self.mtime_ns: int | None = None
        self._open = opener
        self._nursery = nursery
        self._linger = linger
        self._users = 0
        self._shared = False
        self._keeping = False
        self._lock = trio.Lock()
        self._closed = trio.Event()
        self._idle = trio.Event()
        self._stop = trio.Event()
        self._wake = trio.Event()
        self._given_up = False

    @property
    def users(self) -> int:
        return self._users

    @property
    def busy(self) -> bool:
        """Whether it is open, or on its way there or back: whatever changes the file meanwhile is us."""
        return self._keeping or self._users > 0

    async def acquire(self, *, to_write: bool) -> Image:
        """The open image; `release` it. A file that may not be written is opened read-only, and so is one whose lock
        another process holds, unless `to_write`. Raises what `open_image` raises."""
        self._users += 1
        try:
            async with self._lock:
                if self.opened is None:
                    await self._open_as_allowed(to_write)
                elif to_write and self._shared:
                    raise InUseError(self.path, "is in use by another process and open for reading only")
                assert self.opened is not None
                return self.opened
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """One user less."""
        self._users -= 1
        if not self._users:
            self._idle.set()

    async def close(self) -> None:
        """Close the image whoever uses it, and wait for that: until all is written, however long that takes, unless
        there is no hope or `give_up` is called. `failure` says whether it went well. Idempotent."""
        self._stop.set()
        self._idle.set()
        self._wake.set()
        if self._keeping:
            await self._closed.wait()

    def give_up(self) -> None:
        """Let `close` try but once to write what is not written yet."""
        self._given_up = True
        self._wake.set()

    async def _open_as_allowed(self, to_write: bool) -> None:
        self.mtime_ns = None
        self._idle = trio.Event()
        self._shared = False
        if not self.read_only:
            try:
                await self._nursery.start(self._keep, False)
                return
            except InUseError:
                if to_write:
                    raise
                self._shared = True
            except OSError as error:
                if error.errno not in (EACCES, EPERM, EROFS):
                    raise
                _log.info("%s, shown read-only", describe(error, self.path))
        await self._nursery.start(self._keep, True)

    async def _keep(self, read_only: bool, task_status: Any) -> None:
        self._keeping = True
        self._closed = trio.Event()
        closing = False
        spare: int | None = None
        try:
            async with self._open(self.path, read_only) as image:
                self.cached.note_open(image)
                self.opened = image
                task_status.started()
                await self._wait_until_dispensable(image)
                closing = True
                self.opened = None
                self.size = image.size
                if isinstance(image.storage, FileStorage) and image.writable and not self._stop.is_set():
                    with contextlib.suppress(OSError):  # no descriptor left: then it counts as changed by others
                        spare = os.dup(image.storage.fileno())
            self.failure = image.failed
        except Exception as error:
            if not closing:
                raise  # it could not be opened: for `acquire`
            self._note_failure(error)
        finally:
            self.opened = self.unwritten = None
            if spare is not None:
                with trio.CancelScope(shield=True):
                    await self._note_state(spare)
            self._keeping = False
            self._closed.set()
            if closing:
                self._lock.release()

    async def _wait_until_dispensable(self, image: Image) -> None:
        """Returns with the lock held, when the image is not used and closing it loses nothing, or must be closed."""
        pause = _FIRST_PAUSE
        while True:
            await self._wait_until_unused()
            ending = self._stop.is_set()
            if image.failed is None:
                try:
                    await image.clean()
                except OSError as error:
                    if image.failed is None:
                        self._note_unwritten(error)
                except Exception:  # a bug: closing meets it again, and says so
                    return
                else:
                    return
            if ending and (image.failed is not None or self._given_up):
                return
            self._lock.release()
            if image.failed is not None:
                await self._stop.wait()
                continue
            with trio.move_on_after(pause):
                await self._wake.wait()
            pause = min(2 * pause, _LAST_PAUSE)
            self._wake = trio.Event()

    def _note_unwritten(self, error: OSError) -> None:
        if self.unwritten is None or self.unwritten.errno != error.errno:
            _log.error("%s: stays open until what was written can be kept", describe(error, self.path))
        self.unwritten = error

    async def _wait_until_unused(self) -> None:
        """Returns with the lock held, when nobody has used the image for a while, or must not any longer."""
        while True:
            await self._idle.wait()
            with trio.move_on_after(self._linger):
                await self._stop.wait()
            await self._lock.acquire()
            if not self._users or self._stop.is_set():
                return
            self._idle = trio.Event()
            self._lock.release()

    def _note_failure(self, error: Exception) -> None:
        if isinstance(error, OSError):
            self.failure = error
            _log.error("closing failed: %s", describe(error, self.path))
        else:
            self.failure = QedfuseError(self.path, "closing failed, see the log")
            _log.error("%s: closing failed", self.path, exc_info=error)

    async def _note_state(self, fd: int) -> None:
        """Remember how we left the file. The descriptor still holds the image's lock: nobody else has changed it, and
        nobody does until that would show."""
        try:
            status = os.fstat(fd)
            if self.mtime_ns is not None and self.mtime_ns != status.st_mtime_ns:
                os.utime(fd, ns=(status.st_atime_ns, self.mtime_ns))
                status = os.fstat(fd)
            await trio.sleep(min(max(0, status.st_ctime_ns + TICK - time.time_ns()), TICK) / 1e9)
            self.mark = mark_of(status)
            self.cached.note_close(status)
            self.closed_at = time.monotonic()
        except OSError as error:
            _log.warning("%s", describe(error, self.path))
        finally:
            os.close(fd)

    def status(self) -> dict[str, Any]:
        """For `qedfuse status`; sizes in bytes."""
        image = self.opened
        error = (image.failed if image else None) or (None if self._users else self.unwritten)
        return {
            "filename": self.path,
            "virtual-size": image.size if image else None,
            "writable": image.writable if image else False,
            "backing-filename": image.backing.path if image and image.backing else None,
            "error": describe(error, self.path) if error else None,
        }

    def key(self) -> FileKey | None:
        """Which file is open."""
        return key_of(self.opened.storage.stat()) if self.opened else None
