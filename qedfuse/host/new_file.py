"""A file that is not there yet: made for what fills it, durable by its name, and gone again if that fails."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from types import TracebackType

from qedfuse.errors import InUseError
from qedfuse.host import image_lock
from qedfuse.host.file_id import FileId
from qedfuse.host.host_call import Host, HostCall
from qedfuse.host.waiting import in_thread


class NewFile:
    """The file at `path`, for the block that fills it. If there was none it is made (`made`), and removed if the block
    fails. A link that leads nowhere gets its file.

    `make` False: there is one already, which is none of ours. Raises OSError.
    """

    def __init__(self, path: str, *, make: bool = True) -> None:
        self._fd = -1  # held: as long as it is, no other file can have the number of ours
        self._path = os.path.realpath(path)
        if make:
            with suppress(FileExistsError):
                self._fd = _make(path, self._path)
        self.made = self._fd >= 0

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.made:
            try:
                if error is not None:
                    self.remove()
            finally:
                image_lock.close(self._fd)

    async def make_durable(self) -> None:
        """Its name; the content is not ours. Raises OSError."""
        if self.made:
            host = Host(os.fstat(self._fd).st_dev, local=False)
            await in_thread(HostCall(host, sync_directory, (os.path.dirname(self._path),)))

    def remove(self) -> None:
        """Take it away, unless its name is another file's by now or another process uses it, which has then found it
        there and counts on it. To be called when it is not locked here any more. What fails is not told."""
        with suppress(OSError):
            ours = FileId.of(os.lstat(self._path)) == FileId.of(os.fstat(self._fd))
            if ours and not self._is_in_use():
                os.unlink(self._path)

    def _is_in_use(self) -> bool:
        """If not, it is locked: no process begins to use what is removed."""
        try:
            image_lock.lock(self._fd, self._path, writable=True)
        except InUseError:
            return True
        except OSError:
            pass
        return False


def _make(path: str, real: str) -> int:
    try:
        return os.open(real, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except OSError as error:
        error.filename = path
        raise


def sync_directory(path: str) -> None:
    """Make a new name in a directory durable, where the file system knows how."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
    finally:
        os.close(fd)
