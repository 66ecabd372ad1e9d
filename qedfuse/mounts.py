"""The kernel's mounts: finding one by its mountpoint, and taking it away.

Source: proc_pid_mountinfo(5), umount2(2), fusermount3(1).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
from typing import NamedTuple

from qedfuse.errors import QedfuseError

#: What libfuse is told, and what mountinfo shows.
SUBTYPE = "qedfuse"
FSTYPE = f"fuse.{SUBTYPE}"

MNT_FORCE = 1

_MOUNTINFO = "/proc/self/mountinfo"
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)


class Mount(NamedTuple):
    """A line of mountinfo. `device` is "major:minor", `root` the directory in the file system that is mounted,
    `options` are the file system's own."""

    id: int
    parent: int
    device: str
    root: str
    mountpoint: str
    fstype: str
    source: str
    options: str

    @property
    def owner(self) -> int | None:
        """The uid that mounted it (fuse only, else None)."""
        found = re.search(r"(?:^|,)user_id=([0-9]+)", self.options)
        return int(found[1]) if found else None

    @property
    def st_dev(self) -> int:
        """The device number as stat(2) has it."""
        major, minor = self.device.split(":")
        return os.makedev(int(major), int(minor))

    @property
    def is_qedfuse(self) -> bool:
        return self.fstype == FSTYPE


def read_mounts() -> list[Mount]:
    """All mounts that are to be seen here. Raises OSError, ValueError."""
    with open(_MOUNTINFO, "rb") as table:
        return [parse_mount(line) for line in table]


def find_mount(mountpoint: str) -> Mount | None:
    """What is mounted at this path (absolute, without symbolic links); of several, the one on top."""
    here = [mount for mount in read_mounts() if mount.mountpoint == mountpoint]
    below = {mount.parent for mount in here}
    return next((mount for mount in here if mount.id not in below), None)


def parse_mount(line: bytes) -> Mount:
    """One line of mountinfo. Its names are bytes, in whatever encoding: they are taken apart before they are decoded,
    since in some of those a byte of a character looks like a backslash. Raises ValueError."""
    left, _, right = line.rstrip(b"\n").partition(b" - ")
    id, parent, device, root, mountpoint, *_ = left.split(b" ")
    fstype, source, options = [*right.split(b" "), b"", b"", b""][:3]
    return Mount(
        int(id),
        int(parent),
        device.decode("ascii"),
        _unescape(root),
        _unescape(mountpoint),
        os.fsdecode(fstype),
        _unescape(source),
        os.fsdecode(options),
    )


def _unescape(name: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes((int(found[1], 8) & 0xFF,)), name))


def umount2(mountpoint: str, flags: int) -> int:
    """The system call, which follows no symbolic link. Returns an errno, 0 if it is done."""
    done = _libc.umount2(os.fsencode(mountpoint), flags | _UMOUNT_NOFOLLOW) == 0
    return 0 if done else ctypes.get_errno()


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount what is on top at `mountpoint`; blocks while the kernel writes back what it still has.

    `lazy`: detach it now, even if it is in use; the kernel lets go of it after its last use. Raises QedfuseError: EBUSY
    if it is in use, EPERM if it is somebody else's.
    """
    if os.geteuid() == 0:
        code = umount2(mountpoint, _MNT_DETACH if lazy else 0)
        if code == 0:
            return
        if code != errno.EPERM:  # root, but of a container: let fusermount3 try
            raise _failure(mountpoint, code, os.strerror(code).lower())
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C"}
        )
    except FileNotFoundError:
        raise QedfuseError(mountpoint, "cannot unmount: fusermount3 is not installed", errno.ENOENT) from None
    if done.returncode:
        reason = os.fsdecode(done.stderr).strip().splitlines()
        text = reason[-1] if reason else f"fusermount3 failed with exit code {done.returncode}"
        raise _failure(mountpoint, errno.EBUSY if "busy" in text else errno.EPERM, text)


def _failure(mountpoint: str, code: int, text: str) -> QedfuseError:
    if code == errno.EBUSY:
        return QedfuseError(mountpoint, f"is in use{_name_loop_devices(mountpoint)}; stop that first", code)
    return QedfuseError(mountpoint, f"cannot unmount: {text}", code)


def _name_loop_devices(mountpoint: str) -> str:
    """Who holds a mount most often, and is in no list of processes."""
    devices = []
    for name in sorted(os.listdir("/sys/block")) if os.path.isdir("/sys/block") else []:
        try:
            with open(f"/sys/block/{name}/loop/backing_file", "rb") as file:
                backing = os.fsdecode(file.read().removesuffix(b"\n"))
        except OSError:
            continue
        if backing == mountpoint or backing.startswith(mountpoint.rstrip("/") + "/"):
            devices.append(f"/dev/{name}")
    if not devices:
        return " (an open file, a loop device or a working directory)"
    return f" by loop device {', '.join(devices)}"
