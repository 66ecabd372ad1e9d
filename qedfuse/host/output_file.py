"""A host file that is written once, front to back, and is whole or nothing.

Should the writing fail, a file that was made for it is removed, and one that was there before is left empty. The header
of a new QED image goes to the file last, so that whatever ends the process, what is left is no image. With a raw disk
nothing can tell: one that SIGKILL or a crash cut short is not recognised.

As with qemu-img, a file that exists is written in place: its inode, owner, mode and links stay.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from qedfuse.errors import QedfuseError
from qedfuse.host.file_id import FileId
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.image_lock import lock
from qedfuse.host.loop_device import files_behind
from qedfuse.host.new_file import NewFile
from qedfuse.host.reflink import clone_range
from qedfuse.host.storage import Buffer
from qedfuse.host.waiting import shielded

#: So much at a time the host is told to begin writing out: little is left for the sync at the end.
_WRITEBACK_BYTES = 8 << 20


def refuse_sources(path: str, status: os.stat_result, sources: Mapping[FileId, str]) -> None:
    """Raise QedfuseError if the target is one of the files that are read, given with their names, or a loop device
    shows the one as the other."""
    target = FileId.of(status)
    for source, name in sources.items():
        if source == target or source in files_behind(target) or target in files_behind(source):
            raise QedfuseError(path, f"cannot be the target: it is read from (as {name})", errno.EINVAL)


class OutputFile(FileStorage):
    """The file. `made`: it was made or emptied for this; otherwise it keeps its size (a block device, for one).

    It keeps no order among its writes, since before `finish` it is of no use: none is synced earlier. With
    `is_image`, the header (what is written at offset 0) is kept back until then. The engine closes its file when it has
    written it, which is too early: only `release` does.
    """

    def __init__(self, path: str, fd: int, *, made: bool, is_image: bool) -> None:
        super().__init__(path, fd, writable=True)
        self.made = made
        self._is_image = is_image
        self._header: Sequence[Buffer] = ()
        self._begun = 0

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self._is_image and offset == 0:
            self._header = buffers
            return
        await super().write(offset, buffers)
        end = offset + sum(map(len, buffers))
        if end - self._begun >= _WRITEBACK_BYTES:
            with suppress(OSError):  # advice; it begins the writing of the range, waits for none of it
                os.posix_fadvise(self.fileno(), self._begun, end - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = end

    async def share(self, offset: int, source: FileStorage, start: int, size: int) -> None:
        """See `clone_range`."""
        await self._in_thread(clone_range, self.fileno(), offset, source.fileno(), start, size)

    @property
    def block_size(self) -> int:
        """Bytes of a block of the file system: what is shared is so many, at a multiple of it."""
        return os.fstatvfs(self.fileno()).f_frsize

    async def sync(self) -> None:
        pass

    async def empty(self) -> None:
        """Let what it held go. The header of an image goes durably, so that no crash leaves it to what is written next:
        not every file system keeps that order by itself. Raises OSError."""
        held = self.size()
        await self.truncate(0)
        if held and self._is_image:
            await super().sync()

    async def finish(self) -> None:
        """Make all of it durable, then the header. Raises OSError."""
        await super().sync()
        if self._header:
            await super().write(0, self._header)
            await super().sync()

    async def close(self) -> None:
        pass

    async def release(self) -> None:
        """Close it."""
        await super().close()


@asynccontextmanager
async def open_output(
    path: str, *, create: bool, is_image: bool, sources: Mapping[FileId, str]
) -> AsyncIterator[OutputFile]:
    """The file at `path`, locked; durable when the block has ended, undone if it fails or is cancelled.

    With `create`, a file that is not there is made and one that is there is emptied. A raw disk may be a block device
    that is not mounted. `sources` are not to be written.

    Raises InUseError, QedfuseError (a directory, a FIFO, one of `sources`, ...), OSError; nothing is touched then.
    """
    try:
        with NewFile(path, make=create) as new:
            file = _open(path, create, is_image)
            begun = False
            try:
                refuse_sources(path, file.stat(), sources)
                lock(file.fileno(), path, writable=True)
                begun = file.made and not new.made
                if begun:
                    await file.empty()
                yield file
                await file.finish()
                await new.make_durable()
            except BaseException:
                if begun:
                    with shielded(), suppress(OSError):
                        await file.truncate(0)
                with suppress(OSError):
                    await file.release()
                raise
            await file.release()
    except OSError as error:
        error.filename = error.filename or path
        raise


def _open(path: str, create: bool, is_image: bool) -> OutputFile:
    mode = os.stat(path).st_mode  # before opening, which with some devices has effects
    if stat.S_ISDIR(mode):
        raise QedfuseError(path, "is a directory, and cannot be the target", errno.EISDIR)
    if not stat.S_ISREG(mode) and (is_image or not stat.S_ISBLK(mode)):
        kinds = "a regular file" if is_image else "a regular file or a block device"
        raise QedfuseError(path, f"cannot be the target: it is not {kinds}", errno.EINVAL)
    exclusive = os.O_EXCL if stat.S_ISBLK(mode) else 0  # EBUSY if it is mounted
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | exclusive)
    try:
        if stat.S_IFMT(os.fstat(fd).st_mode) != stat.S_IFMT(mode):
            raise QedfuseError(path, "was replaced by something else just now", errno.EAGAIN)
        return OutputFile(path, fd, made=create and stat.S_ISREG(mode), is_image=is_image)
    except BaseException:
        os.close(fd)
        raise
