"""One image of a mount: opened when first used, closed a little after its last use.

An image is opened and closed by one task (`_keep`). Its users, the tasks and open files that have called `acquire`,
count themselves in and out. The lock is held while the image is being opened or closed, so that no user finds it
halfway, and a new user waits for the close to end (the image's own lock would refuse it before).

Closing throws away what is in memory, so it comes after a flush that has succeeded. While the host has no space for
what was written the image stays open, for the next user as well, and the flush is tried again. An image whose sync has
failed stays open, too, until the mount ends: opened again, it would not know of it. How a closed image's file is left
is another matter (`leaving.py`).

Reading changes nothing: an image is opened for reading only, with a reader's locks, and not even repaired. The first
user that wants to write has it opened for writing, for all its users; if that cannot be, only that user is told.

An image without users is given to the next one only if opening it would lead to the same files.

What the users share is a slot (`image_slot.py`). Another image can be put there while they use it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from errno import EACCES, EPERM, EROFS
from typing import Any

import trio

from qedfuse.chain.upgrade import make_writable
from qedfuse.errors import QedfuseError
from qedfuse.fuse.image_slot import ImageSlot
from qedfuse.fuse.leaving import LeftFile
from qedfuse.fuse.page_cache import CachedPages
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.offload import to_its_end
from qedfuse.layers.layer import layers_of
from qedfuse.qed.image import Image
from qedfuse.text import describe

#: path -> an image that is open for reading, until it is closed
Opener = Callable[[str], Awaitable[Image]]
Upgrade = Callable[[Image], Awaitable[None]]
Question = Callable[[Image], Awaitable[bool]]

#: Seconds until what could not be written is tried again, at first and at most.
_FIRST_PAUSE = 0.5
_LAST_PAUSE = 4.0

_log = logging.getLogger("qedfuse")


class MountedImage:
    """An image that is open while it has users, and `linger` seconds longer.

    `read_only`: never opened for writing. `is_current`: whether the names of an open image's backing files still lead
    to what is open. `path`: where it is opened; may be changed, for a file that was renamed. `slot`: where the image is
    while it is open. `on_replace`: called with an image that replaces another. `local`: it is open, and none of its
    files' hosts can fail to answer. `failure`: why the last close failed. `unwritten`: why it cannot be closed yet.
    `left`: its file as we have left it. `cached`: what the kernel may have cached of it.
    """

    __slots__ = (
        "_closed",
        "_given_up",
        "_hurry",
        "_idle",
        "_is_current",
        "_keeping",
        "_linger",
        "_lock",
        "_nursery",
        "_open",
        "_ours",
        "_retired",
        "_retiring",
        "_stop",
        "_upgrade",
        "_upgrading",
        "_users",
        "_waiting",
        "_wake",
        "cached",
        "failure",
        "left",
        "local",
        "on_replace",
        "path",
        "read_only",
        "slot",
        "unwritten",
    )

    def __init__(
        self,
        path: str,
        opener: Opener,
        nursery: trio.Nursery,
        *,
        read_only: bool,
        linger: float,
        upgrade: Upgrade = make_writable,
        is_current: Question | None = None,
    ) -> None:
        self.path = path
        self.read_only = read_only
        self.slot = ImageSlot()
        self.on_replace: Callable[[Image], None] | None = None
        self.failure: OSError | None = None
        self.unwritten: OSError | None = None
        self.cached = CachedPages()
        self.left = LeftFile(self.cached)
        self._open = opener
        self._upgrade = upgrade
        self._is_current = is_current
        self._nursery = nursery
        self._linger = linger
        self._users = 0
        self._waiting = 0  # for it to be open, to become users
        self._retiring = False
        self._keeping = False
        self._ours = False
        self._lock = trio.Lock()
        self._upgrading = trio.Lock()
        self._closed = trio.Event()
        self._idle = trio.Event()
        self._hurry = trio.Event()
        self._retired = trio.Event()
        self._stop = trio.Event()
        self._wake = trio.Event()
        self._given_up = False
        self.local = False

    @property
    def opened(self) -> Image | None:
        """The image while it is open. To be used before the next await, and not its file: see `image_slot.py`."""
        return self.slot.image

    @property
    def open(self) -> bool:
        """Whether it is open, or on its way there or back."""
        return self._keeping

    @property
    def busy(self) -> bool:
        """Whether the image is open, being opened or being closed, or has users, or tasks wait in `acquire` for it.

        Valid until the next await. While it is False nothing here refers to an open image: the node may be dropped.
        """
        return self._keeping or self._is_used()

    def _is_used(self) -> bool:
        return self._users + self._waiting > 0

    @property
    def changing(self) -> bool:
        """Whether we may have changed its file since it was `left`, or it has users, which would lose it."""
        return self._ours or self._is_used()

    async def acquire(self, *, to_write: bool) -> ImageSlot:
        """The slot, with the image in it until `release`. If it is `to_write` it is open for writing, unless the file
        may not be written. Raises what `open_for_use` and `make_writable` raise."""
        self._waiting += 1
        try:
            await self._get()
            self._users += 1
        finally:
            self._waiting -= 1
            self._note_idle()
        if to_write:
            try:
                await self.make_writable()
            except BaseException:
                self.release()
                raise
        return self.slot

    async def _get(self) -> None:
        """Have it open."""
        while True:
            async with self._lock:
                if self.opened is None:
                    await self._nursery.start(self._keep)
                    assert self.opened is not None
                    return
                if not self._retiring and (self._users or await self._may_stay(self.opened)):
                    return
                self._retire()
                retired = self._retired
            await retired.wait()

    async def _may_stay(self, image: Image) -> bool:
        """Whether the image, which has had no user for a moment, is what opening it would give. One that must be kept
        is."""
        if self.unwritten is not None or image.failed is not None:
            return True
        return self.cached.is_current(image) and (self._is_current is None or await self._is_current(image))

    async def make_writable(self) -> None:
        """Have the image open for writing, for one of its users; unless the file may not be written, or is not to be.
        Raises what `upgrade.make_writable` raises."""
        assert self._users
        if self.read_only:
            return
        async with self._upgrading, self.slot as image:
            if image.writable:
                return
            self.cached.note_changes(image)  # the rest is us
            self._ours = True
            try:
                await self._upgrade(image)
            except OSError as error:
                if error.errno not in (EACCES, EPERM, EROFS):
                    raise
                _log.info("%s, shown read-only", describe(error, self.path))
            else:
                self.cached.note_writing()

    def release(self) -> None:
        """One user less."""
        self._users -= 1
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._is_used():
            self._idle.set()

    async def close(self) -> None:
        """Close the image even if it has users, and wait for that: until all is written, however long that takes,
        unless there is no hope or `give_up` is called. `failure` says whether it went well. Idempotent."""
        self._stop.set()
        self._idle.set()
        self._hurry.set()
        self._wake.set()
        if self._keeping:
            await self._closed.wait()

    async def close_if_idle(self) -> bool:
        """Close the image now if it only lingers; wait for that, and for a close that has begun. Returns whether it was
        closed meanwhile. Cancellation is harmless."""
        if not self._keeping or self._is_used():
            return False
        closed = self._closed
        async with self._lock:
            image = self.opened
            if image is None:
                return closed.is_set()
            if self._is_used() or image.failed is not None:  # it would not be closed
                return False
            self._retire()
            if self.unwritten is not None:
                self._wake.set()
            retired = self._retired
        await retired.wait()
        return closed.is_set()

    def _retire(self) -> None:
        self._retiring = True
        self._idle.set()
        self._hurry.set()

    def give_up(self) -> None:
        """Let `close` try but once to write what is not written yet."""
        self._given_up = True
        self._wake.set()

    # -- another image ------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def quiesced(self) -> AsyncIterator[Image]:
        """See `ImageSlot.quiesced`; `replace` may be called in the block. The image is opened for that if it is not
        open, and no other user's open or close comes between."""
        await self.acquire(to_write=False)
        try:
            async with self._lock, self.slot.quiesced() as image:
                self.cached.note_changes(image)
                yield image
        finally:
            self.release()

    def replace(self, image: Image) -> None:
        """See `ImageSlot.replace`. The image is closed by this object from now on, and opened again at `image.path`, so
        that must be the name that its file keeps. Its locks are taken, as the opener takes them. How the file is now is
        what we have made of it: to be called after the last change of the file that is no write to the image.
        """
        self.slot.replace(image)
        self.cached.note_replaced(image)
        self.path = image.path
        self.local = _is_local(image)
        self.left.size = image.size
        self.left.note(image.storage.stat())
        if self.on_replace is not None:
            self.on_replace(image)

    # -- opened and closed --------------------------------------------------------------------------------------------

    async def _keep(self, task_status: Any) -> None:
        self._keeping = True
        self.local = False
        self._closed = trio.Event()
        self._idle = trio.Event()
        self._hurry = trio.Event()
        self._retired = trio.Event()
        self._retiring = False
        self.left.mtime_ns = None
        closing = False
        spare: int | None = None
        try:
            self.slot.put(await self._open(self.path))
            try:
                self._note_open()
                task_status.started()
                image = await self._wait_until_dispensable()
                closing = True
                spare = self.left.keep_descriptor(image, ending=self._stop.is_set())
            finally:
                await self._close(self.slot.take())
        finally:
            self.unwritten = None
            if spare is not None:
                with trio.CancelScope(shield=True):
                    await self.left.leave(spare, self.path, local=self.local, ending=self._stop)
            self._keeping = self._ours = False
            self._closed.set()
            self._retired.set()
            if closing:
                self._lock.release()

    def _note_open(self) -> None:
        image = self.opened
        assert image is not None
        self.cached.note_open(image)
        self.left.size = image.size
        self.local = _is_local(image)

    async def _close(self, image: Image) -> None:
        self.left.size = image.size
        try:
            await to_its_end(image.close)
        except Exception as error:
            self._note_failure(error)
        else:
            self.failure = image.failed

    async def _wait_until_dispensable(self) -> Image:
        """Returns the image, with the lock held, when it is not used and closing it loses nothing, or it must be
        closed."""
        pause = _FIRST_PAUSE
        while True:
            await self._wait_until_unused()
            image = self.opened
            assert image is not None
            ending = self._stop.is_set()
            if image.failed is None:
                try:
                    await image.clean()
                except OSError as error:
                    if image.failed is None:
                        self._note_unwritten(error)
                except Exception:  # a bug: closing meets it again, and says so
                    return image
                else:
                    return image
            if ending and (image.failed is not None or self._given_up):
                return image
            self._retiring = False
            self._retired.set()
            self._retired = trio.Event()
            if not self._stop.is_set():
                self._hurry = trio.Event()
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
        """Returns with the lock held, when the image has had no user for a while, or may have none any longer."""
        while True:
            await self._idle.wait()
            with trio.move_on_after(self._linger):
                await self._hurry.wait()
            await self._lock.acquire()
            if self._stop.is_set() or self._retiring or not self._is_used():
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

    def status(self) -> dict[str, Any]:
        """For `qedfuse status`; sizes in bytes. "files": which ones are open, from the image's down its chain."""
        image = self.opened
        storages = [layer.storage for layer in layers_of(image)]
        error = (image.failed if image else None) or (None if self._users else self.unwritten)
        return {
            "filename": self.path,
            "virtual-size": image.size if image else None,
            "writable": image.writable if image else False,
            "backing-filename": image.backing.path if image and image.backing else None,
            "files": [storage.id._asdict() for storage in storages if isinstance(storage, FileStorage)],
            "error": describe(error, self.path) if error else None,
        }


def _is_local(image: Image) -> bool:
    storages = (layer.storage for layer in layers_of(image))
    return all(storage.local for storage in storages if isinstance(storage, FileStorage))
