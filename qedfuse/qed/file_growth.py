"""How an image's file comes by new clusters: step 0 of the rulebook in `commit.py`.

A file grows by truncate, many clusters at a time. A block device cannot grow: what is free on it is zeroed, durably,
before it is handed out (`reserve.py` has found it).
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from typing import Protocol

import trio

from qedfuse.host.storage import Storage
from qedfuse.qed.allocator import Allocator, HostRun
from qedfuse.qed.header import Header
from qedfuse.qed.reserve import Reserve
from qedfuse.sizes import HostOffset

#: A file grows by this many clusters at a time, but not by more than the bytes below: one truncate for many.
_GROW_CLUSTERS = 1024
_GROW_BYTES = 64 << 20
#: Bytes of a device that are zeroed ahead at a time: at first, and at most.
_ZERO_MIN = 1 << 20
_ZERO_MAX = 64 << 20


class Durability(Protocol):
    """What makes changes to the file durable; see `commit.Committer`."""

    unsynced: bool

    async def flush(self) -> None: ...
    async def sync_alone(self) -> None: ...


class Growth(ABC):
    """Of one image that is open for writing. Sizes are bytes. Every call may raise OSError, and can be repeated then,
    also when it was cancelled. `file_size`: clusters handed out may lie behind it until `extend`."""

    def __init__(self, storage: Storage, allocator: Allocator, durability: Durability) -> None:
        self.file_size = storage.size()
        self._storage = storage
        self._allocator = allocator
        self._durability = durability
        self._growing = trio.Lock()

    @abstractmethod
    async def measure(self) -> None:
        """Have `room` tell what is true."""

    @property
    @abstractmethod
    def room(self) -> int | None:
        """Bytes that new clusters can take. None: the file system knows."""

    def covers(self, room: int = 0) -> bool:
        """Whether the file covers every cluster handed out, and a run of `room` bytes that can be."""
        return self.file_size >= self._allocator.end + (room if room and not self._allocator.has_free(room) else 0)

    async def extend(self, room: int = 0) -> None:
        """Let the file cover every cluster handed out, and a run of `room` bytes that can be; ENOSPC if a device has
        none."""
        if not self.covers(room):
            async with self._growing:
                await self._extend(room)

    @abstractmethod
    async def _extend(self, room: int) -> None: ...

    @abstractmethod
    async def trim(self) -> None:
        """Give up what is free at the end, as far as the file can, for good: nothing is handed out after this."""

    @abstractmethod
    async def give_up(self, end: HostOffset) -> None:
        """No entry refers to what lies behind `end` any more, durably, and nothing of it waits to be used. It may be
        handed out again after a sync."""


class FileGrowth(Growth):
    """Of a file."""

    def __init__(self, storage: Storage, allocator: Allocator, durability: Durability, cluster_size: int) -> None:
        super().__init__(storage, allocator, durability)
        self._cluster_size = cluster_size

    async def measure(self) -> None:
        """There is nothing to measure."""

    @property
    def room(self) -> None:
        return None

    async def _extend(self, room: int) -> None:
        end = self._allocator.end + room
        if self.file_size >= end:
            return
        size = end + min(_GROW_CLUSTERS * self._cluster_size, _GROW_BYTES) // self._cluster_size * self._cluster_size
        try:
            await self._storage.truncate(size)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            size = end  # close to the host's limit: without a reserve
            await self._storage.truncate(size)
        self.file_size = size
        self._durability.unsynced = True

    async def trim(self) -> None:
        await self._cut(self._allocator.trim())

    async def give_up(self, end: HostOffset) -> None:
        await self._cut(end)
        self._allocator.cut(end)

    async def _cut(self, end: int) -> None:
        if end < self.file_size:
            self._durability.unsynced = True
            await self._storage.truncate(end)
            self.file_size = end


class DeviceGrowth(Growth):
    """Of a block device."""

    def __init__(self, storage: Storage, allocator: Allocator, durability: Durability, header: Header) -> None:
        super().__init__(storage, allocator, durability)
        self._header = header
        self._reserve = Reserve(storage, header)
        self._zeroed = 0  # bytes, to be handed out

    async def measure(self) -> None:
        await self._reserve.find()

    @property
    def room(self) -> int:
        """Before `measure`, and the first new cluster, the device's size."""
        return self._reserve.total + self._allocator.free + self._allocator.lost

    async def _extend(self, room: int) -> None:
        """A device is full when nothing is on its way back either."""
        while not self._allocator.has_free(room):
            await self._reserve.find()
            runs = await self._reserve.take(room, min(max(self._zeroed, _ZERO_MIN), _ZERO_MAX))
            if runs:
                await self._zero(runs)
            elif self._allocator.has_lost:
                await self._durability.flush()
            else:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._storage.path)

    async def _zero(self, runs: list[HostRun]) -> None:
        try:
            if not self._zeroed:
                await self._durability.sync_alone()
            for offset, size in runs:
                await self._storage.punch(offset, size)
            await self._durability.sync_alone()
        except BaseException:
            self._reserve.put_back(runs)
            raise
        self._allocator.put_free(runs)
        self._zeroed += sum(size for _offset, size in runs)

    async def trim(self) -> None:
        """Its size is what it is."""

    async def give_up(self, end: HostOffset) -> None:
        """What is free is looked for anew."""
        self._allocator.forget_free()
        self._reserve, self._zeroed = Reserve(self._storage, self._header), 0
        await self._reserve.find()
