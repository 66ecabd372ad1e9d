"""Names and errors as text. Names come from images and directories: bytes without a guarantee. Pure."""

from __future__ import annotations

import os

from qedfuse.errors import FormatError, QedfuseError


def printable(text: str) -> str:
    """`text` on one line and harmless to a terminal: names in images may be anything.

    A byte that is no character in this locale stays as it is (as `os.fsdecode` has it): the name can be used again.
    """
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else repr(c)[1:-1] for c in text)


def describe(error: OSError, path: str | os.PathLike[str] = "") -> str:
    """One plain line for any OSError: `path: what is wrong`."""
    if isinstance(error, QedfuseError):
        return printable(str(error))
    name = (error.filename or "''") if isinstance(error.filename, str) else os.fspath(path)
    text = os.strerror(error.errno).lower() if error.errno else str(error)
    return printable(f"{name}: {text}" if name else text)


def decode_backing_name(raw: bytes, path: str) -> str:
    """The backing file's name from its bytes, as `os.fsdecode` has it: what is opened has these very bytes for a name.

    Raises FormatError, with the image's `path`, for an embedded NUL.
    """
    if b"\0" in raw:
        raise FormatError(path, "the backing file's name contains a nul byte")
    return os.fsdecode(raw)
