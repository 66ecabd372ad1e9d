"""A file that is not there yet, and the durability of its name."""

from __future__ import annotations

import errno
import os


def make_file(path: str) -> str | None:
    """See to it that there is a file; its real path if it is new. A link that leads nowhere gets its file."""
    real = os.path.realpath(path)
    try:
        os.close(os.open(real, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        return None
    except OSError as error:
        error.filename = path
        raise
    return real


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
