"""The one exception family of qedfuse.

Every error that a user can cause is a `QedfuseError`: a plain lower-case line that names the file and what is wrong,
an errno for the file system edge, and an exit code for the command line. It is an `OSError`, so that code that
handles host I/O errors handles these, too.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Iterator
from typing import Self, TypeVar

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
#: Ctrl-C, as a shell reports a command that SIGINT ended.
EXIT_INTERRUPTED = 130


_Error = TypeVar("_Error", bound="QedfuseError")


class QedfuseError(OSError):
    """An error with a message for a person: `path: message`.

    `path` is the file at fault (`filename`, too, as with any OSError), `message` says what is wrong and what to do.
    `errno` is what a FUSE caller gets.
    """

    default_errno = _errno.EIO
    exit_code = EXIT_FAILED

    def __init__(self, path: str | os.PathLike[str], message: str, errno: int | None = None) -> None:
        super().__init__(errno if errno is not None else self.default_errno, message)
        self.path = os.fspath(path)
        self.message = message
        self.filename = self.path or None

    def reworded(self, message: str) -> Self:
        """The same error with another message."""
        error = _remake(type(self), self.path, message, self.errno)
        vars(error).update({**vars(self), "message": message})
        return error

    def __reduce__(self) -> tuple[object, ...]:
        """Copied, and pickled for another process, by what it consists of: a subclass may be made of other things."""
        return _remake, (type(self), self.path, self.message, self.errno), {**vars(self), "filename": self.filename}

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


def _remake(kind: type[_Error], path: str, message: str, errno: int | None) -> _Error:
    error = kind.__new__(kind)
    QedfuseError.__init__(error, path, message, errno)
    return error


class FormatError(QedfuseError):
    """The file is no valid image: wrong magic, a field out of range."""

    default_errno = _errno.EINVAL


class UnsupportedError(QedfuseError):
    """The file is valid, but uses something that qedfuse does not have or was told to refuse."""

    default_errno = _errno.ENOTSUP


class CorruptError(QedfuseError):
    """The image's tables contradict themselves or the file."""

    default_errno = _errno.EIO


class InUseError(QedfuseError):
    """Another process holds the image's lock."""

    default_errno = _errno.EBUSY


class ReadOnlyError(QedfuseError):
    """A write to an image that is open read-only."""

    default_errno = _errno.EROFS


class UsageError(QedfuseError):
    """The command line asks for something that makes no sense."""

    default_errno = _errno.EINVAL
    exit_code = EXIT_USAGE


def leaves(error: BaseException) -> Iterator[BaseException]:
    """What really happened: trio wraps what comes out of a nursery in groups."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
