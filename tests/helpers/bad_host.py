"""A host file system whose calls fail or fall short when told: real system calls, real errnos, real short transfers.

It is a FUSE mount of its own, served by another process. Its files are kept in memory and never in the kernel's cache,
so that every system call on one arrives here and is counted. Of the counted calls, one fails: with an errno, EINTR
among them, or (a read, a write) by transferring half.

    with bad_host(directory) as host:
        host.path("disk.qed").write_bytes(...)
        host.arm(Plan(call=7, how="EINTR"))     # counts from 0, from now on
        ...
        host.disarm()                           # the kinds of calls that have come since `arm`
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, InodeT, RequestContext, SetattrFields

CONTROL = ".control"
SHORT = "short"
_CONTROL_NODE = InodeT(pyfuse3.ROOT_INODE + 1)


@dataclass
class Plan:
    """`how`: the name of an errno, or "short". `call`: -1 for none."""

    call: int = -1
    how: str = "EIO"


class BadHost:
    """The mount, for the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        return self.directory / name

    def arm(self, plan: Plan) -> None:
        self._control(json.dumps(asdict(plan)).encode())

    def disarm(self) -> list[str]:
        with self.path(CONTROL).open("rb", buffering=0) as file:
            calls: list[str] = json.loads(file.read(1 << 20))
        self._control(json.dumps(asdict(Plan())).encode())
        return calls

    def _control(self, message: bytes) -> None:
        with self.path(CONTROL).open("wb", buffering=0) as file:
            file.write(message)


@contextmanager
def bad_host(directory: Path) -> Iterator[BadHost]:
    """Mounted at `directory` for a block."""
    directory.mkdir()
    with subprocess.Popen([sys.executable, "-m", "tests.helpers.bad_host", str(directory)]) as process:
        try:
            deadline = time.monotonic() + 20
            while not os.path.ismount(directory):
                assert process.poll() is None and time.monotonic() < deadline, "the bad host does not come up"
                time.sleep(0.01)
            yield BadHost(directory)
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(directory)], check=False)
            try:
                process.wait(20)
            finally:
                process.kill()


# -- the other process ------------------------------------------------------------------------------------------------


class _Operations(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self.names: dict[bytes, InodeT] = {CONTROL.encode(): _CONTROL_NODE}
        self.files: dict[InodeT, bytearray] = {_CONTROL_NODE: bytearray()}
        self.plan = Plan()
        self.calls: list[str] = []

    def _now(self, kind: str, node: InodeT) -> bool:
        """Count a call. Raises if it is the one to fail; True if it is to fall short."""
        if node == _CONTROL_NODE:
            return False
        self.calls.append(kind)
        if len(self.calls) - 1 != self.plan.call:
            return False
        if self.plan.how == SHORT:
            return True
        raise FUSEError(getattr(errno, self.plan.how))

    def _attributes(self, node: InodeT) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node
        entry.st_mode = stat.S_IFDIR | 0o755 if node == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        entry.st_size = len(self.files.get(node, b""))
        entry.st_blocks = entry.st_size // 512
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.attr_timeout = entry.entry_timeout = 0
        return entry

    async def getattr(self, inode: InodeT, ctx: RequestContext | None = None) -> EntryAttributes:
        return self._attributes(inode)

    async def lookup(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if name not in self.names:
            raise FUSEError(errno.ENOENT)
        return self._attributes(self.names[name])

    async def create(
        self, parent_inode: InodeT, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        node = self.names[name] = InodeT(_CONTROL_NODE + len(self.names))
        self.files[node] = bytearray()
        return FileInfo(fh=pyfuse3.FileHandleT(node), direct_io=True), self._attributes(node)

    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        if flags & os.O_TRUNC:
            self.files[inode].clear()
        return FileInfo(fh=pyfuse3.FileHandleT(inode), direct_io=True)

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        if fields.update_size:
            self._now("truncate", inode)
            content = self.files[inode]
            del content[attr.st_size :]
            content.extend(bytes(attr.st_size - len(content)))
        return self._attributes(inode)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        node = InodeT(fh)
        if node == _CONTROL_NODE:
            return json.dumps(self.calls).encode()[off : off + size]
        data = bytes(self.files[node][off : off + size])
        return data[: max(1, len(data) // 2)] if self._now("read", node) else data

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        node = InodeT(fh)
        if node == _CONTROL_NODE:
            self.plan, self.calls = Plan(**json.loads(buf)), []
            return len(buf)
        if self._now("write", node):
            buf = buf[: max(1, len(buf) // 2)]
        content = self.files[node]
        content.extend(bytes(max(0, off - len(content))))
        content[off : off + len(buf)] = buf
        return len(buf)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        self._now("sync", InodeT(fh))

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        pass

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        pass

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        pass


def _serve(directory: str) -> None:
    pyfuse3.init(_Operations(), directory, {"fsname=bad-host", "default_permissions"})
    try:
        trio.run(pyfuse3.main)
    finally:
        with contextlib.suppress(RuntimeError):
            pyfuse3.close()


if __name__ == "__main__":
    _serve(sys.argv[1])
