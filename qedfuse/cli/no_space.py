"""What a command says that changes an image step by step, when there is no space: what it has left, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qedfuse.cli.in_use import name_mount
from qedfuse.errors import QedfuseError
from qedfuse.qed.header import MAGIC


@contextmanager
def reads_as_before(image: str) -> Iterator[None]:
    """As `name_mount`, around work that leaves `image` reading as before, whatever of it is done."""
    try:
        with name_mount():
            yield
    except OSError as error:
        if isinstance(error, QedfuseError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = os.strerror(error.errno).lower()
        name = error.filename if isinstance(error.filename, str) else image
        message = f"{reason}; {image} reads as before: make room, and run the command again"
        if _is_qed(name):
            message += f" (`qedfuse compact {name}` gives back what it has written)"
        raise QedfuseError(name, message, error.errno) from None


def _is_qed(path: str) -> bool:
    """Whether what could not be finished has left clusters there that nothing refers to."""
    with suppress(OSError), open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC
    return False
