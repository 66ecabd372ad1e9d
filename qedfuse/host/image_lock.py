"""QEMU's image locks: what keeps QEMU and qedfuse from writing one image at the same time.

The locks are advisory, on single bytes of the image file, shared (read) locks of the open file description. Byte 100+p
locked: a process holds permission p. Byte 200+p locked: a process does not let others have p. A process that opens an
image first locks its own bytes, then asks for each permission it holds whether 200+p is locked, and for each that it
does not share whether 100+p is. Because the locks come before the tests, of two that open at the same time
at least one sees the other (both may fail). The kernel drops the locks when the last descriptor of the description is
closed, so a killed process leaves none. A child that was forked a moment ago may have one, so we give the locks back
before we close ours: else whoever opens the image next would be refused, ourselves included.

What QEMU 7.2 takes (strace of qemu-io, qemu-img, qemu-nbd, qemu-storage-daemon), by p:

| opened as                                       | holds   | does not share |
|-------------------------------------------------|---------|----------------|
| qed or qcow2, writable                          | 0, 1, 3 | 1, 3           |
| qed or qcow2, read-only (also as backing file)  | 0       | 1, 3           |
| the same by `qemu-img info`                     | none    | 1, 3           |
| the same with -U                                | 0       | none           |
| raw, writable (qemu-io)                         | 0, 1    | none           |
| raw backing file, by `qemu-img convert`         | 0       | 1, 3           |
| raw backing file, by the others                 | 0       | none           |

0 consistent read, 1 write, 2 write unchanged, 3 resize. qedfuse takes the first row for a writable image, the second
for everything it reads, raw backing files included: a raw file that changes under an overlay is as harmful.

On a block device the locks are the same, on its node: two nodes of one device do not exclude each other.

Source: QEMU block/file-posix.c (image locking), fcntl(2) "Open file description locks".
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from contextlib import suppress

from qedfuse.errors import InUseError
from qedfuse.host.lock_holder import find_holder, name_of

_HELD_BASE = 100
_UNSHARED_BASE = 200
_BASES_END = 300

_CONSISTENT_READ = 0
_WRITE = 1
_RESIZE = 3

_HELD_TO_READ = (_CONSISTENT_READ,)
_HELD_TO_WRITE = (_CONSISTENT_READ, _WRITE, _RESIZE)
_UNSHARED = (_WRITE, _RESIZE)

#: struct flock with 64-bit offsets: type, whence, start, length, pid; padded to the size that the kernel copies.
_FLOCK = struct.Struct("hhqqi0q")

_NO_LOCKS_HERE = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_log = logging.getLogger("qedfuse")


def lock(fd: int, path: str, *, writable: bool) -> None:
    """Take QEMU's locks on an image that is open as `fd`; they last until `close`.

    Does not wait. Raises InUseError if another process (or another descriptor of this one) uses the image in a way
    that excludes ours, and then leaves no lock behind; OSError if the file system fails. Where the file system has no
    such locks there are none to honour either, and the call succeeds, as QEMU's locking=auto does.
    """
    held = _HELD_TO_WRITE if writable else _HELD_TO_READ
    try:
        blocked = _apply(fd, held) or _conflict(fd, held)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        if writable:
            _log.warning("%s: this file system has no locks: nothing keeps others from writing the image", path)
        return
    if blocked is not None:
        unlock(fd)
        raise InUseError(path, _explain(fd, blocked))


def add_writers_locks(fd: int, path: str) -> None:
    """From a reader's locks, which the descriptor has, to a writer's. At no time could another process write.

    Raises as `lock` does, and then leaves a reader's locks as they were.
    """
    try:
        blocked = _conflict(fd, _HELD_TO_WRITE)  # first, as readers that come meanwhile would be refused
        if blocked is None:
            blocked = _apply(fd, _HELD_TO_WRITE) or _conflict(fd, _HELD_TO_WRITE)
            if blocked is not None:
                drop_writers_locks(fd)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        _log.warning("%s: this file system has no locks: nothing keeps others from writing the image", path)
        return
    if blocked is not None:
        raise InUseError(path, _explain(fd, blocked))


def close(fd: int) -> None:
    """close(2) of what may be locked, and no longer is. Raises OSError; closed it is in any case."""
    try:
        with suppress(OSError):  # this file system has no locks
            unlock(fd)
    finally:
        os.close(fd)


def unlock(fd: int) -> None:
    """Give all locks back. Raises OSError."""
    whole = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, _HELD_BASE, _BASES_END - _HELD_BASE, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole)


def drop_writers_locks(fd: int) -> None:
    """Back to a reader's locks. Raises OSError."""
    for p in set(_HELD_TO_WRITE).difference(_HELD_TO_READ):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, _HELD_BASE + p, 1, 0))


def share_writers_locks(fd: int) -> None:
    """A writer's locks for a second descriptor of a file on which this process has them already. Raises OSError."""
    try:
        _apply(fd, _HELD_TO_WRITE)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise


def _apply(fd: int, held: tuple[int, ...]) -> int | None:
    """Lock our bytes. Returns a byte that is locked exclusively, which QEMU never does, or None."""
    for byte in [_HELD_BASE + p for p in held] + [_UNSHARED_BASE + p for p in _UNSHARED]:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return byte
            raise
    return None


def _conflict(fd: int, held: tuple[int, ...]) -> int | None:
    """A byte that another description has locked and that excludes us, or None."""
    for byte in [_UNSHARED_BASE + p for p in held] + [_HELD_BASE + p for p in _UNSHARED]:
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        answer: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))[0]
        if answer != fcntl.F_UNLCK:
            return byte
    return None


def _explain(fd: int, byte: int) -> str:
    if byte < _UNSHARED_BASE:
        what = "may write to it"
    elif byte == _UNSHARED_BASE + _CONSISTENT_READ:
        what = "lets nobody read it"
    else:
        what = "lets nobody write to it"
    pid = find_holder(fd, byte)
    if pid is None:
        return f"is in use by another process (of unknown pid), which {what}; close it there first"
    if pid == os.getpid():
        return f"is in use by this process (pid {pid}), which {what}; close it first"
    return f"is in use by another process ({name_of(pid)}pid {pid}), which {what}; close it there first"
