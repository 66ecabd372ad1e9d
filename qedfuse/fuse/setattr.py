"""chmod, chown and utimes of a raw file, passed to the image file.

Permission to do it is the kernel's to check where it enforces owner and mode at all, and the host's, since the daemon
may do no more than its user.
"""

from __future__ import annotations

import errno
import os
import stat

from qedfuse.fuse.options import MountOptions


def change_owner(
    fd: int, *, caller: int, mode: int | None, uid: int | None, gid: int | None, options: MountOptions
) -> None:
    """Change what is not None. Read and write bits only: an image file's other bits are its own affair.

    Raises OSError: EPERM if `caller` (a uid) is neither root nor the owner, or if the mount's options decide.
    """
    if mode is None and uid is None and gid is None:
        return
    status = os.fstat(fd)
    decided = (
        (mode is not None and options.umask is not None)
        or (uid is not None and options.uid is not None)
        or (gid is not None and options.gid is not None)
    )
    if decided or caller not in (0, status.st_uid):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    if uid is not None or gid is not None:
        os.fchown(fd, -1 if uid is None else uid, -1 if gid is None else gid)
    if mode is not None:
        os.fchmod(fd, stat.S_IMODE(status.st_mode) & ~0o666 | mode & 0o666)


def change_times(fd: int, *, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Set what is not None (nanoseconds). Raises OSError."""
    if atime_ns is None and mtime_ns is None:
        return
    status = os.fstat(fd)
    os.utime(
        fd,
        ns=(
            status.st_atime_ns if atime_ns is None else atime_ns,
            status.st_mtime_ns if mtime_ns is None else mtime_ns,
        ),
    )
