"""The place that an image of a mount has: what file handles, the tree and the fast path hold, never the image itself.

So the image can be replaced by another one with the same content under open files (after a conversion in place, by an
overlay for a snapshot). The slot is a gate in front of the image, for readers and one writer in the sense of a
readers-writer lock: requests are the readers, a replacement is the writer.

- A request that can be done at once, without an await, asks `ready` and uses what it finds: nothing else runs on the
  event loop meanwhile, so there is nothing to lock. That is one attribute more than holding the image itself.
- A request that waits holds the slot: `async with slot as image`. It is counted in and out.
- `quiesced` takes `ready` away. From then on every request that arrives waits, and those under way are waited for,
  whatever they wait for themselves: a disk, a range lock, a commit that is taken step by step. So none is left that
  holds the old image, none waits in the old image's queues, and nothing has to be moved from there to the new image.
  Then all is flushed, and the image marked clean: its file may be read, copied or closed by now.
- At the end the requests that wait find in `ready` what `replace` has put there.

The fast path answers requests on the same thread, but not in a task, so it does not pass the gate. It is an observer:
`hide` takes the image away from it, `show` gives it another one. Both are called by a task, and C only runs while
pyfuse3 receives a request, in another task on the same thread: never in the middle of a call of ours. Before C returns
to Python it has told of all writes and has no request half done (`filter.c`). So after `hide` no descriptor and no page
of the old image is known to C, and no answer of it is missing.

An error is never lost with an image. One whose sync has failed refuses every flush from then on, so it cannot be
quiesced, hence not be replaced: it stays, read-only, and every fsync says so. The same holds while what was written
does not fit on the host: `quiesced` raises that error, and the requests go on with the image that they had.

What holds the slot must not wait for the kernel to have another request of the same file answered, which would wait at
the gate for it: a request that has the kernel write back its pages (LSEEK), or that tells it times (FLUSH), lets go
before. For the same reason the slot must not be taken twice by one task.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from qedfuse.qed.image import Image


class Observer(Protocol):
    """What uses the slot's image without holding the slot."""

    def hide(self) -> None:
        """Let go of the image, at once."""

    def show(self, image: Image) -> None:
        """Use this image from now on."""


class ImageSlot:
    """A place for an open image, empty at first. Belongs to one event loop.

    `image`: what is in it, also while it is quiesced, when its file may be closed: for what needs no file. `ready`: the
    same, to be used before the next await; None while it is empty or quiesced. `observers`: see the module.
    """

    __slots__ = ("_drained", "_resumed", "_turn", "_users", "image", "observers", "ready")

    def __init__(self) -> None:
        self.image: Image | None = None
        self.ready: Image | None = None
        self.observers: list[Observer] = []
        self._users = 0
        self._turn = trio.Lock()
        self._resumed = trio.Event()
        self._drained = trio.Event()

    def put(self, image: Image) -> None:
        """Fill the slot, which is empty."""
        self.image = self.ready = image

    def take(self) -> Image:
        """Empty the slot. No request whose outcome matters may be using it."""
        image, self.image, self.ready = self.image, None, None
        assert image is not None
        return image

    # -- requests -----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Image:
        """The image, which stays the same until `__aexit__`. Raises OSError(EBADF) if there is none."""
        while self.ready is None:
            if self.image is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            await self._resumed.wait()
        self._users += 1
        return self.ready

    async def __aexit__(self, *_exception: object) -> None:
        self.release()

    def hold(self) -> None:
        """As entering, for what goes on with an image that it got from `ready` just now; `release` it."""
        assert self.ready is not None
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if not self._users:
            self._drained.set()

    # -- replacing ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def quiesced(self) -> AsyncIterator[Image]:
        """No request uses the image during the block, all that was written is durable, and the file is marked clean.

        Requests that arrive wait; none fails. The block gets the image, and must leave an open one in the slot, also if
        it fails: the same, or one that it has put there with `replace`. It must not wait for what the kernel asks of
        the raw file, which waits for the block. A second task waits for its turn.

        Raises OSError(EBADF) if the slot is empty, and what `Image.clean` raises: then nothing has changed. Cancelled
        while it waits for requests to end, it lets all go on.
        """
        async with self._turn:
            if self.image is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self.ready = None
            try:
                for observer in self.observers:
                    observer.hide()
                while self._users:
                    self._drained = trio.Event()
                    await self._drained.wait()
                await self.image.clean()
                yield self.image
            finally:
                self._resume()

    def _resume(self) -> None:
        self.ready = self.image
        self._resumed.set()
        self._resumed = trio.Event()
        if self.ready is not None:
            for observer in self.observers:
                observer.show(self.ready)

    def replace(self, image: Image) -> None:
        """Put `image` in the place of the one that is there. Within a `quiesced` block, at whose end all requests go to
        it, also if the block fails. May be called again in the same block.

        `image` is open, with no request under way, and used by nothing else. It has the same content and size, also
        through its backing files, and can be written if and only if the old one can. The old one is the caller's from
        now on, to be closed or kept. Raises ValueError if size or writability differ; then nothing has changed.
        """
        old = self.image
        assert old is not None and self.ready is None
        if image.size != old.size or image.writable != old.writable:
            raise ValueError(f"{image.path} cannot take the place of {old.path}")
        self.image = image
