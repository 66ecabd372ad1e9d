"""A FUSE file system that shows a directory of the host, and can be stopped: a stand-in for a server that dies.

    with loopback(directory, point) as host:
        host.stop()        # whoever asks it for something waits
        host.go_on()

In the end its connection is aborted, so that nobody waits for it any more, whatever state it is in.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from qedfuse.host.mountinfo import find_mount
from tests.helpers.mounts.mounts import abort, aborted, need_fuse, wait_until
from tests.helpers.qemu.cli import environment


class Loopback:
    """The process that serves it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def loopback(directory: Path, point: Path) -> Iterator[Loopback]:
    need_fuse()
    command = [sys.executable, "-m", __name__, str(directory), str(point)]
    with aborted(point), subprocess.Popen(command, env=environment()) as process:
        try:
            wait_until(lambda: process.poll() is not None or find_mount(os.path.realpath(point)) is not None)
            assert process.poll() is None
            yield Loopback(process)
        finally:
            process.kill()
            abort(point)


# -- the file system --------------------------------------------------------------------------------------------------


def _translated(method: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def translated(*args: Any) -> Any:
        try:
            return await method(*args)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    return translated


class _Files(pyfuse3.Operations):
    """Every inode is known by its path, for as long as the process lives."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self._paths = {pyfuse3.ROOT_INODE: directory}
        self._inodes: dict[str, int] = {directory: pyfuse3.ROOT_INODE}

    def _inode(self, path: str) -> int:
        inode = self._inodes.setdefault(path, len(self._inodes) + 1)
        self._paths[inode] = path
        return inode

    def _entry(self, path: str) -> pyfuse3.EntryAttributes:
        status = os.lstat(path)
        entry = pyfuse3.EntryAttributes()
        for name in ("mode", "nlink", "uid", "gid", "size", "blocks", "atime_ns", "mtime_ns", "ctime_ns"):
            setattr(entry, f"st_{name}", getattr(status, f"st_{name}"))
        entry.st_ino = self._inode(path)
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    @_translated
    async def lookup(self, parent: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._entry(os.path.join(self._paths[parent], os.fsdecode(name)))

    @_translated
    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._entry(self._paths[inode])

    @_translated
    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> pyfuse3.EntryAttributes:
        if fields.update_size:
            os.truncate(self._paths[inode], attr.st_size)
        if fields.update_mtime:
            os.utime(self._paths[inode], ns=(attr.st_mtime_ns, attr.st_mtime_ns))
        return self._entry(self._paths[inode])

    @_translated
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        return os.fsencode(os.readlink(self._paths[inode]))

    @_translated
    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    @_translated
    async def readdir(self, fh: int, start: int, token: Any) -> None:
        directory = self._paths[fh]
        for index, name in enumerate(sorted(os.listdir(directory))):
            if index >= start:
                entry = self._entry(os.path.join(directory, name))
                if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, index + 1):
                    break

    @_translated
    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        access = flags & os.O_ACCMODE
        fd = os.open(self._paths[inode], os.O_RDWR if access == os.O_WRONLY else access)
        return pyfuse3.FileInfo(fh=fd, keep_cache=False)

    @_translated
    async def read(self, fh: int, offset: int, size: int) -> bytes:
        return os.pread(fh, size, offset)

    @_translated
    async def write(self, fh: int, offset: int, data: bytes) -> int:
        return os.pwrite(fh, data, offset)

    @_translated
    async def fsync(self, fh: int, datasync: bool) -> None:
        os.fsync(fh)

    async def flush(self, fh: int) -> None:
        pass

    @_translated
    async def release(self, fh: int) -> None:
        os.close(fh)

    @_translated
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        host = os.statvfs(self._paths[pyfuse3.ROOT_INODE])
        result = pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax"):
            setattr(result, f"f_{name}", getattr(host, f"f_{name}"))
        return result


def _serve(directory: str, point: str) -> None:
    pyfuse3.init(_Files(directory), point, {"fsname=loopback", "subtype=loopback", "default_permissions"})
    with suppress(KeyboardInterrupt):
        trio.run(pyfuse3.main)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
