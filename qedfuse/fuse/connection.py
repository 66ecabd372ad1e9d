"""The connection to the kernel behind a mount, apart from its requests: its control files, and its end by force.

Source: Linux Documentation/filesystems/fuse.rst on the control file system; umount2(2) on MNT_FORCE; unshare(2).
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress

from qedfuse.host.mountinfo import find_mount
from qedfuse.host.unmount import MNT_FORCE, umount2

_CONTROL = "/sys/fs/fuse/connections"

_CLONE_NEWNS = 0x20000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


def abort(mountpoint: str, device: str) -> None:
    """End the connection: a process that waits for an answer gets an error, and so does one that asks from now on.

    This process must not try to answer, or to receive, afterwards.
    """
    fd = open_control(device, "abort", os.O_WRONLY)
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


def open_control(device: str, name: str, flags: int) -> int:
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
