"""A small file of ours beside another one: after a crash it has its old content or its new one, whole.

    1 the content goes to a temporary name, and is synced
    2 that name is renamed over the file's; the directory is synced

What a crash leaves before the rename, apart from the old file, is one with the temporary name, which the next write
replaces. All calls block.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Container
from contextlib import suppress

from qedfuse.errors import QedfuseError
from qedfuse.host.new_file import sync_directory

#: What a temporary name ends with.
_NEW = ".new"


def read_note(path: str, most: int, owners: Container[int] | None = None) -> bytes | None:
    """The content, of which `most` bytes are looked at; None if there is none. Raises OSError, EINVAL for what is no
    regular file, EPERM for one of none of the `owners` (user ids): the name may have been put there by a stranger. No
    symbolic link is followed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return None
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        if owners is not None and status.st_uid not in owners:
            raise QedfuseError(path, "belongs to another user; remove it, unless that user is trusted", errno.EPERM)
        with open(fd, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(fd)


def write_note(path: str, content: bytes, mode: int) -> None:
    """Make `content` the file's, durably. `mode`: permissions. Raises OSError; it has then its old content, or the new
    one."""
    new = path + _NEW
    with suppress(FileNotFoundError):
        os.unlink(new)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.rename(new, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
    sync_directory(os.path.dirname(path))


def remove_note(path: str) -> None:
    """Durably, and what a crash has left of it; it need not be there. Raises OSError."""
    for name in (path + _NEW, path):
        with suppress(FileNotFoundError):
            os.unlink(name)
    sync_directory(os.path.dirname(path))
