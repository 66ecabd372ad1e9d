"""The true size again, after a buffered write that was past what an image's geometry can map.

With the writeback cache the kernel is the master of a file's size. It takes any write, however far behind the end, and
the file is longer from then on; that the image cannot be (EFBIG) the kernel hears when it hands the data out. The data
is lost, which the next fsync says, once. But the size stays, and nothing but truncate(2) makes a file shorter.

So a child truncates it (`sidecar.c`). Before that the kernel is made to hand out what it still has (a notification).
The child asks for a size that no image can have, one byte more than the limit: by this `setattr` knows it, and answers
with the size that the image has then, so that nothing is cut off that has reached us. What another process writes
between the two, behind the image's end and inside the limit, would be: it is a moment of microseconds after a program
has failed, but it is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import trio

from qedfuse.fuse.node import Node
from qedfuse.host.lookups import abandonable
from qedfuse.native import _sidecar
from qedfuse.qed.image import Image
from qedfuse.text import describe

#: Seconds from a failed write to the truncation: the kernel hands out many at once.
_DELAY = 0.1
#: Seconds that it may take.
_PATIENCE = 20.0

_log = logging.getLogger("qedfuse")


class Oversize:
    """Of one mount. `path_of`: where a node is to be seen; `device`: the mount's number (st_dev). `hand_out`: makes the
    kernel write all that it has of an inode; blocks."""

    def __init__(
        self, nursery: trio.Nursery, path_of: Callable[[Node], bytes], device: int, hand_out: Callable[[int], None]
    ) -> None:
        self._nursery = nursery
        self._path_of = path_of
        self._device = device
        self._hand_out = hand_out
        self._busy: dict[int, int] = {}  # by node, how many writes were too far out
        self._threads = trio.CapacityLimiter(4)  # they wait for requests, which may need one of trio's own

    def note(self, node: Node, offset: int, size: int) -> None:
        """A write was too far out, perhaps past the limit (bytes). Returns at once."""
        image = node.mounted.opened
        if image is None or offset + size <= image.geometry.max_image_size:
            return
        busy = node.id in self._busy
        self._busy[node.id] = self._busy.get(node.id, 0) + 1
        if not busy:
            limit = image.geometry.max_image_size
            _log.error("%s: a write at %d is lost: this image can have at most %d bytes", image.path, offset, limit)
            self._nursery.start_soon(self._restore, node, image.path, limit)

    def asks(self, node: Node, image: Image, size: int) -> bool:
        """Whether it is our child that truncates, and wants the true size."""
        return node.id in self._busy and size == image.geometry.max_image_size + 1

    async def _restore(self, node: Node, path: str, limit: int) -> None:
        seen = 0
        try:
            while seen != self._busy[node.id]:
                seen = self._busy[node.id]
                await trio.sleep(_DELAY)
                with trio.move_on_after(_PATIENCE):
                    await self._truncate(node, limit)
        except OSError as error:
            _log.warning("%s: the raw file's size cannot be set right: %s", path, describe(error))
        finally:
            del self._busy[node.id]

    async def _truncate(self, node: Node, limit: int) -> None:
        await abandonable(partial(self._hand_out, node.id), self._threads)
        await abandonable(partial(_sidecar.cut, self._path_of(node), self._device, node.id, limit), self._threads)
