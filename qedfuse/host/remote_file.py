"""A host file behind which there is another process or machine, in a daemon that has other images to serve.

A server that does not answer lets a system call wait for ever, and calls that are harmless on a disk may be such: a
write into the page cache, an fstat, a close. So every one of them is made in a thread, none on the event loop, and what
must be known at once is remembered from the last call.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import trio

from qedfuse.host import image_lock
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.host_call import HostCall
from qedfuse.host.lookups import enter, look
from qedfuse.host.mountinfo import find_by_id, is_remote, mount_id
from qedfuse.host.storage import Buffer, HostExtent, find_extents

#: Seconds that fresh attributes may take.
_PATIENCE = 2.0


class _Waiting:
    """Calls that wait for remote hosts: their `count`, and an event that is set while there are `some`."""

    def __init__(self) -> None:
        self.count = 0
        self.some = trio.Event()

    def begin(self) -> None:
        self.count += 1
        self.some.set()

    def end(self) -> None:
        self.count -= 1
        if not self.count:
            self.some = trio.Event()


waiting = _Waiting()


class RemoteFile(FileStorage):
    """See `storage.Storage`. `stat` and `size` tell what was true when the file was opened, last changed, or
    `refresh`ed; of its holes nothing is known. `mount`: the id of the mount that it lies on."""

    local = False

    def __init__(self, path: str, fd: int, writable: bool, mount: int) -> None:
        super().__init__(path, fd, writable)
        self.mount = mount
        self._refreshing = False
        self._former: list[int] = []
        self._note()

    def become(self, other: FileStorage) -> None:
        """The former descriptor stays open until the file is closed: closing one may have to wait for the host."""
        status, size = other.stat(), other.size()  # first: should it fail, nothing has changed
        self._former.append(self._fd)
        self._fd, other._fd = other.fileno(), -1
        self.writable = other.writable
        self._status, self._size = status, size

    async def _wait_for(self, call: HostCall) -> object:
        waiting.begin()
        try:
            return await super()._wait_for(call)
        finally:
            waiting.end()

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return False

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        await self._in_thread(self._write_and_note, offset, buffers)

    def _write_and_note(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._write_all(offset, buffers)
        if offset + sum(map(len, buffers)) > self._size:
            self._note()

    def write_behind(self, offset: int, size: int) -> None:
        """There is one thread for that, for all files."""

    def _truncate(self, size: int) -> None:
        super()._truncate(size)
        self._note()

    def _reserve(self, offset: int, size: int) -> None:
        super()._reserve(offset, size)
        self._note()

    async def refresh(self) -> None:
        if not self._refreshing:
            with suppress(OSError):
                await look(self._ask, patience=_PATIENCE)

    def _ask(self) -> None:
        self._refreshing = True
        try:
            enter(self.mount)
            self._note()
        finally:
            self._refreshing = False

    def _note(self) -> None:
        self._status = super().stat()
        self._size = super().size()

    def stat(self) -> os.stat_result:
        return self._status

    def size(self) -> int:
        return self._size

    async def statvfs(self) -> os.statvfs_result:
        return await look(self._ask_for_space)

    def _ask_for_space(self) -> os.statvfs_result:
        enter(self.mount)
        return os.fstatvfs(self._fd)

    async def close(self) -> None:
        former, self._former = self._former, []
        try:
            if self.writable:
                await super().close()
            elif self._fd >= 0:
                former.append(self._fd)
                self._fd = -1
        finally:
            for fd in former:  # which were open for reading: there is nothing to lose
                with suppress(OSError):
                    await look(partial(os.close if self._lent else image_lock.close, fd), patience=_PATIENCE)

    def next_data(self, offset: int) -> int | None:
        return offset if offset < self._size else None

    def next_hole(self, offset: int) -> int:
        if offset >= self._size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), self.path)
        return self._size

    async def find_extents(self, ranges: Sequence[tuple[int, int]], most: int) -> list[HostExtent]:
        return find_extents(self, ranges, most)


def isolate(file: FileStorage) -> FileStorage:
    """The same file, opened a moment ago, for a process in which nothing else may wait for its host. Blocks."""
    mount = mount_id(file.fileno())
    if not is_remote(find_by_id(mount)):
        return file
    return RemoteFile(file.path, file.fileno(), file.writable, mount)
