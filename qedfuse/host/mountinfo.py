"""The kernel's mounts: finding one by its mountpoint.

Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

#: What libfuse is told, and what mountinfo shows.
SUBTYPE = "qedfuse"
FSTYPE = f"fuse.{SUBTYPE}"


_MOUNTINFO = "/proc/self/mountinfo"


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
