"""The connection to the kernel behind a mount, apart from its requests: its limit, and its end by force.

Source: Linux Documentation/filesystems/fuse.rst on the control file system; umount2(2) on MNT_FORCE; unshare(2).
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress

from qedfuse.mounts import MNT_FORCE, find_mount, umount2

_CONTROL = "/sys/fs/fuse/connections"

_CLONE_NEWNS = 0x20000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


class BackgroundLimit:
    """How many requests the kernel hands out at a time that nobody waits for one by one: readahead, direct reads and
    writes, writing back. By default it is 12, for all files together.

    `usual`: what it is by itself; None if it cannot be changed. `device` is the mount's "MAJOR:MINOR".
    """

    def __init__(self, device: str) -> None:
        self.usual: int | None = None
        self._fd = _open(device, "max_background", os.O_WRONLY)
        fd = _open(device, "max_background", os.O_RDONLY)  # one cannot go back in it, and writes at its start alone
        if fd >= 0:
            with suppress(OSError, ValueError):
                self.usual = int(os.read(fd, 20))
            os.close(fd)

    def set(self, limit: int) -> None:
        with suppress(OSError):
            os.write(self._fd, b"%d" % limit)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def abort(mountpoint: str, device: str) -> None:
    """End the connection: whoever waits for an answer gets an error, and so does whoever asks from now on.

    This process must not try to answer, or to receive, afterwards.
    """
    fd = _open(device, "abort", os.O_WRONLY)
    if fd >= 0:
        with suppress(OSError):
            os.write(fd, b"1")
        os.close(fd)
    here = find_mount(mountpoint)
    if here is not None and here.device == device and os.geteuid() == 0:
        umount2(mountpoint, MNT_FORCE)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fuse in fuse_descriptors():
        os.dup2(null, fuse, inheritable=False)  # the last descriptor of it


def fuse_descriptors() -> list[int]:
    """This process's descriptors of /dev/fuse."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.append(int(name))
    return found


def _open(device: str, name: str, flags: int) -> int:
    """A file of the connection's in the control file system; -1 if that cannot be had."""
    path = f"{_CONTROL}/{device.partition(':')[2]}/{name}"
    found = [-1]

    def attempt() -> None:
        with suppress(OSError):
            found[0] = os.open(path, flags | os.O_CLOEXEC)

    def attempt_apart() -> None:
        if _libc.unshare(_CLONE_NEWNS):
            return
        failed = (_libc.mount(None, top, None, _MS_REC | _MS_PRIVATE, None) for top in (b"/", b"/sys"))
        if all(failed):  # the root directory of a chroot is no mount
            return
        if not _libc.mount(b"fusectl", _CONTROL.encode(), b"fusectl", 0, None):
            attempt()

    attempt()
    if found[0] < 0 and os.geteuid() == 0:  # not mounted: it will be, for a moment, in a thread's mount namespace
        with suppress(RuntimeError):
            thread = threading.Thread(target=attempt_apart, daemon=True)
            thread.start()
            thread.join()
    return found[0]
