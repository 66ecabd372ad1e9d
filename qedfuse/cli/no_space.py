"""What a command says that changes an image step by step, when there is no space: what it has left, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from qedfuse.cli.in_use import name_mount
from qedfuse.errors import QedfuseError


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
        raise QedfuseError(name, message, error.errno) from None
