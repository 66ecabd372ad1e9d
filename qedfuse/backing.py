"""From the backing file's name in an image to an open file: what a name means, and what may be opened.

The name comes from the image and may be hostile. A file is first pinned by an O_PATH descriptor, which has no side
effect on devices and FIFOs, then judged by what the pin refers to, and opened through the pin: what was judged is what
is read, whatever happens to the path meanwhile.

Source: QEMU block.c, "path_has_protocol" and "path_combine"; open(2) on O_PATH, proc(5) on /proc/pid/fd.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from qedfuse.errors import FormatError, QedfuseError, UnsupportedError
from qedfuse.storage import FileStorage

#: Characters of a name that a message shows.
_SHOWN = 200


@dataclass(frozen=True)
class BackingPolicy:
    """Which backing files may be opened, at every level of a chain.

    `allowed` False: none (--no-backing). `root`: only regular files inside this directory, symbolic links followed
    (--backing-root); None: any file or block device. `refused_device`: st_dev of the mount that shows the image, which
    would wait for itself if it read from there.
    """

    allowed: bool = True
    root: str | None = None
    refused_device: int | None = None


ANY_BACKING = BackingPolicy()


def shown(name: str) -> str:
    """A name from an image, fit for one line of a message."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def resolve_backing(image: str, name: str) -> str:
    """The path that `name`, as stored in the image at path `image`, stands for.

    A relative name is relative to the directory of the image, taken from its path as given. "file:" is dropped (QEMU
    would take a relative name behind it from the working directory, which a daemon has not).
    Raises UnsupportedError for a name that is no file's: any other `protocol:`, `json:` included.
    """
    if "\0" in name:
        raise FormatError(image, "the backing file's name contains a nul byte")
    path = name.removeprefix("file:")
    protocol, colon, _rest = path.partition(":")
    if path == name and colon and "/" not in protocol:
        raise UnsupportedError(
            image, f"refers to backing file {shown(name)}, but only files are supported, not {shown(protocol)}: names"
        )
    if not path:
        raise FormatError(image, "the backing file's name is empty")
    return os.path.join(os.path.dirname(image), path)


def open_backing_file(image: str, path: str, policy: BackingPolicy) -> FileStorage:
    """Open the backing file at `path`, named by the image at path `image`, read-only. May block on a slow disk.

    Raises UnsupportedError if the policy forbids it; QedfuseError, with the host's errno, if it is missing, unreadable
    or neither a regular file nor a block device. The messages name both files.
    """
    if not policy.allowed:
        raise UnsupportedError(
            image, f"refers to backing file {shown(path)} and backing files are refused (--no-backing)"
        )
    try:
        root = None if policy.root is None else os.path.realpath(policy.root)
        if root is not None:
            _check_inside(image, path, _real_path(path), root)  # before it is told apart from a missing file
        return _open_judged(image, path, root, policy.refused_device)
    except QedfuseError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO).lower()
        raise QedfuseError(image, f"cannot open its backing file {shown(path)}: {reason}", error.errno) from None


def _real_path(path: str) -> str:
    try:
        return os.path.realpath(path)
    except RecursionError:  # a chain of more links than the kernel would follow
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None


def _open_judged(image: str, path: str, root: str | None, refused_device: int | None) -> FileStorage:
    pin = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        link = f"/proc/self/fd/{pin}"
        if root is not None:
            _check_inside(image, path, os.readlink(link), root)
        status = os.fstat(pin)
        _check_device(image, path, status, refused_device)
        _check_type(image, path, status.st_mode, allow_device=root is None)
        fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    finally:
        os.close(pin)
    return FileStorage(path, fd, writable=False)


def _check_inside(image: str, path: str, real: str, root: str) -> None:
    if not os.path.isabs(real) or os.path.commonpath([real, root]) != root:  # what has no path is in no directory
        raise UnsupportedError(
            image, f"refers to backing file {shown(path)}, which lies outside {shown(root)} (--backing-root)"
        )


def _check_device(image: str, path: str, status: os.stat_result, refused: int | None) -> None:
    if status.st_dev == refused:
        raise UnsupportedError(
            image, f"refers to backing file {shown(path)}, which lies in the mount that shows the image itself"
        )


def _check_type(image: str, path: str, mode: int, *, allow_device: bool) -> None:
    if stat.S_ISREG(mode) or (allow_device and stat.S_ISBLK(mode)):
        return
    kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise QedfuseError(image, f"cannot open its backing file {shown(path)}: it is {kind}", code)
