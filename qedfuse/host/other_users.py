"""Whether a file is open anywhere else: QEMU's locks tell of QEMU and of qedfuse, and not of a loop device, a backup or
a swap file.

Source: fcntl(2), "Leases": a write lease is granted only if this is the one open file description of the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from contextlib import suppress

from qedfuse.errors import InUseError
from qedfuse.host.file_id import FileId


def refuse_other_users(fd: int, path: str) -> None:
    """Raise InUseError if the file is open elsewhere, in this process, too. `fd` is open for writing. Where that cannot
    be told (another user's file, some file systems) nothing is raised."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # who opens it just now makes the kernel signal; this is ignored
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise InUseError(path, f"is open {_where(fd)}; close it there first") from None
        return
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _where(fd: int) -> str:
    wanted = FileId.of(os.fstat(fd))
    for name in _listed("/sys/block"):
        with suppress(OSError), open(f"/sys/block/{name}/loop/backing_file", "rb") as file:
            if FileId.at(os.fsdecode(file.read().rstrip(b"\n"))) == wanted:
                return f"as the loop device /dev/{name}"
    return "in another process"


def _listed(directory: str) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if name.startswith("loop")]
    except OSError:  # no /sys
        return []
