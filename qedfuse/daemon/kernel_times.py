"""Times of change that the kernel neither keeps nor asks for: those of a file mount's root, and of direct writes.

With the writeback cache the kernel is itself the master of a file's size and time of change: it takes both from the
file system when it looks the file up, and keeps them from then on. The root of a mount is never looked up, and it
exists before the cache is agreed on: its size is 0 until it is told otherwise (`session.tell_root_size`), and its
time of change stays what it is until a process sets it, as with touch(1). So does any file's when it is written past
the cache (seen with Linux 6.18). `sidecar.c` tells why that process cannot simply be the daemon.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import trio

from qedfuse.errors import QedfuseError
from qedfuse.fuse.image_slot import ImageSlot
from qedfuse.fuse.node import Node
from qedfuse.host.lookups import abandonable
from qedfuse.native import _sidecar
from qedfuse.text import describe

#: Seconds that setting the time may take, and at the start.
_PATIENCE = 2.0
_START_PATIENCE = 20.0
#: Seconds from a look at a file that is being written to its consequence: a program may look after each of its writes.
_DELAY = 0.25

#: What is at the path is not the file, which may have another name by now, or none; or its image was closed meanwhile.
_ELSEWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EBADF)

_log = logging.getLogger("qedfuse")


class Target(NamedTuple):
    """A file: where the kernel shows it, with what number, and where its image is."""

    path: bytes
    inode: int
    slot: ImageSlot


class Clock:
    """Tells the kernel when a file was last written, as often as a writer closes it.

    Only then, or while it is open, since the mount is in use then anyway: at any other time a look from outside could
    come in the way of unmounting. `device`: the mount's number (st_dev), nothing else is touched. `count` says how many
    writes there have been: the image file itself changes at other times, too.
    """

    def __init__(self, device: int, count: Callable[[], int]) -> None:
        self._device = device
        self._count = count
        self._told = 0
        self._telling: int | None = None
        self._complained = False
        self._lock = trio.Lock()
        self._one = trio.CapacityLimiter(1)  # still taken by a call that has lasted too long

    async def start(self, target: Target) -> None:
        """Tell a time for the first time. Raises QedfuseError if the kernel believes in another size than the image's:
        then the mount is not usable. That the time cannot be told is only logged."""
        try:
            size = await self._set_time(target, _START_PATIENCE)
        except OSError as error:
            self._complain(target, error)
            return
        async with target.slot as image:  # which may have replaced another one meanwhile, of the same size
            wanted = image.size
        if size is not None and size != wanted:
            message = f"mounted, but not usable: the kernel shows {size} bytes instead of {wanted}"
            raise QedfuseError(os.fsdecode(target.path), message)

    async def update(self, target: Target) -> None:
        """A handle is being closed, or somebody looks. What fails is logged, and tried again with the next one."""
        async with self._lock:
            count = self._count()
            if count != self._told and self._one.available_tokens and await self._tell(target):
                self._told = count

    async def _tell(self, target: Target) -> bool:
        try:
            return await self._set_time(target, _PATIENCE) is not None
        except OSError as error:
            if error.errno == errno.ENODEV:
                return True  # the mount has left its place: what has it open goes on, but not by this path
            if error.errno not in _ELSEWHERE:
                self._complain(target, error)
            return False

    async def _set_time(self, target: Target, seconds: float) -> int | None:
        """The size that the kernel believes in; None if it takes longer than this (a writer waits for a slow disk with
        the file locked, or the kernel's requests are answered no longer). Raises OSError."""
        async with target.slot as image:
            time = image.storage.stat().st_mtime_ns
        # Without the slot, for the SETATTR that comes of it. If the image is replaced before that, the other one's file
        # gets this time: it is the content's, which is the same.
        self._telling = time
        arguments = (target.path, self._device, target.inode, *divmod(time, 1_000_000_000))
        with trio.move_on_after(seconds):
            return await abandonable(partial(_sidecar.set_time, *arguments), self._one)
        return None

    def tells(self, mtime_ns: int) -> bool:
        """Whether this is what the kernel is being told."""
        return mtime_ns == self._telling and not self._one.available_tokens

    def _complain(self, target: Target, error: OSError) -> None:
        """Once: what it cannot do now, it can most often not do at all."""
        if not self._complained:
            path = os.fsdecode(target.path)
            _log.warning("%s: cannot tell the kernel the time of change: %s", path, describe(error))
        self._complained = True


class Clocks:
    """The clocks of a mount's files: one for the root of a file mount, others once they are written past the cache.

    `path_of`: where a node is to be seen. `nursery`: where a look's consequences go on.
    """

    def __init__(
        self, nursery: trio.Nursery, path_of: Callable[[Node], bytes], device: int, count: Callable[[], int]
    ) -> None:
        self._nursery = nursery
        self._path_of = path_of
        self._device = device
        self._count = count
        self._clocks: WeakKeyDictionary[Node, Clock] = WeakKeyDictionary()
        self._due: set[Node] = set()

    async def start(self, root: Node) -> None:
        """See `Clock.start`."""
        await self._clock(root).start(self._target(root))

    async def update(self, node: Node) -> None:
        """A handle on the root, or one that writes past the cache, is being closed."""
        await self._clock(node).update(self._target(node))

    def tells(self, node: Node, mtime_ns: int) -> bool:
        """Whether a SETATTR may be of our own making: the image file has had this time, and may have a later one."""
        clock = self._clocks.get(node)
        return clock is not None and clock.tells(mtime_ns)

    def update_soon(self, node: Node) -> None:
        """Somebody looks at a file that is written past the cache. This look still sees the time before."""
        if node not in self._due:
            self._due.add(node)
            self._nursery.start_soon(self._update_later, node)

    async def _update_later(self, node: Node) -> None:
        await trio.sleep(_DELAY)
        self._due.remove(node)
        if node.direct_writers:  # else it was closed, and the mount may be on its way down
            await self.update(node)

    def _target(self, node: Node) -> Target:
        """As of now: it may be renamed."""
        return Target(self._path_of(node), node.id, node.mounted.slot)

    def _clock(self, node: Node) -> Clock:
        if node not in self._clocks:
            self._clocks[node] = Clock(self._device, self._count)
        return self._clocks[node]
