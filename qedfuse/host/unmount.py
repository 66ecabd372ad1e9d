"""Taking a mount away.

Source: umount2(2), fusermount3(1).
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess

from qedfuse.errors import QedfuseError

MNT_FORCE = 1
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_libc = ctypes.CDLL(None, use_errno=True)


def umount2(mountpoint: str, flags: int) -> int:
    """The system call, which follows no symbolic link. Returns an errno, 0 if it is done."""
    done = _libc.umount2(os.fsencode(mountpoint), flags | _UMOUNT_NOFOLLOW) == 0
    return 0 if done else ctypes.get_errno()


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount what is on top at `mountpoint`; blocks while the kernel writes back what it still has.

    `lazy`: detach it now, even if it is in use; the kernel lets go of it after its last use. Raises QedfuseError: EBUSY
    if it is in use, EPERM if it is another user's.
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
    """What holds a mount most often, and is in no list of processes."""
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
