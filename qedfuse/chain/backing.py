"""From the backing file's name in an image to an open file: what a name means, and what may be opened.

The name comes from the image and may be hostile. It is walked a component at a time (`walk.py`). The file at its end
is pinned by an O_PATH descriptor, which has no side effect on devices and FIFOs, judged by what the pin refers to, and
opened through the pin: what was walked and judged is what is read, whatever happens to the path meanwhile.

Source: QEMU block.c, "path_has_protocol" and "path_combine"; open(2) on O_PATH, proc(5) on /proc/pid/fd.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from qedfuse.chain.policy import BackingPolicy
from qedfuse.errors import FormatError, QedfuseError, UnsupportedError
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.lookups import cannot_tell
from qedfuse.host.walk import LeadsBackError, Walk

#: Characters of a name that a message shows.
_SHOWN = 200


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

    Raises UnsupportedError if the policy forbids it or it lies in a qedfuse mount; QedfuseError, with the host's errno,
    if it is missing, unreadable or neither a regular file nor a block device, the messages name both files;
    NoAnswerError.
    """
    if not policy.allowed:
        raise UnsupportedError(
            image, f"refers to backing file {shown(path)} and backing files are refused (--no-backing)"
        )
    with _walk(image, path, policy.root) as walk:
        try:
            pin = walk.follow(path)
        except LeadsBackError as error:
            raise UnsupportedError(
                image,
                f"refers to backing file {shown(path)}, which lies in a qedfuse mount ({shown(error.mountpoint)})",
            ) from None
        except OSError as error:
            if not cannot_tell(error):
                _check_inside(image, path, walk, policy.root)  # before it is told apart from a missing file
            raise
        _check_inside(image, path, walk, policy.root)
        _check_type(image, path, os.fstat(pin).st_mode, allow_device=policy.root is None)
        return FileStorage.open(path, False, pin=pin)


@contextmanager
def _walk(image: str, path: str, root: str | None) -> Iterator[Walk]:
    """The host's errors in the block name both files."""
    try:
        with Walk(root) as walk:
            yield walk
    except QedfuseError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO).lower()
        raise QedfuseError(image, f"cannot open its backing file {shown(path)}: {reason}", error.errno) from None


def _check_inside(image: str, path: str, walk: Walk, root: str | None) -> None:
    if root is not None and not walk.inside:
        raise UnsupportedError(
            image,
            f"refers to backing file {shown(path)}, which lies outside {shown(os.path.realpath(root))} "
            "(--backing-root)",
        )


def _check_type(image: str, path: str, mode: int, *, allow_device: bool) -> None:
    if stat.S_ISREG(mode) or (allow_device and stat.S_ISBLK(mode)):
        return
    kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise QedfuseError(image, f"cannot open its backing file {shown(path)}: it is {kind}", code)
