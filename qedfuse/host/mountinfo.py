"""The kernel's mounts: which are there, and which of them an open file lies on, without asking its file system.

A stat(2) of a file in a FUSE mount waits for the daemon behind it. What is here is answered by the kernel alone: the
mount's id from fdinfo, and what is mounted under it from mountinfo. The kernel tells by poll(2) when mountinfo has
changed, so it is read again only then; an id is not given to another mount while a descriptor refers to it.

Source: proc_pid_mountinfo(5), proc_pid_fdinfo(5).
"""

from __future__ import annotations

import os
import re
import select
import threading
from typing import NamedTuple

#: What libfuse is told, and what mountinfo shows.
SUBTYPE = "qedfuse"
FSTYPE = f"fuse.{SUBTYPE}"

_MOUNTINFO = "/proc/self/mountinfo"

#: File systems behind which there is another process or machine, which may stop answering. With "fuse." and a word
#: behind it they are any FUSE file system's.
_REMOTE = frozenset(
    (
        *("fuse", "fuseblk", "virtiofs", "9p", "vboxsf", "nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs"),
        *("ceph", "coda", "lustre", "gpfs", "ocfs2", "gfs2", "glusterfs", "beegfs", "orangefs", "pvfs2", "autofs"),
    )
)


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


# -- by an open file ---------------------------------------------------------------------------------------------------


def mount_id(fd: int) -> int:
    """The id of the mount that an open file (O_PATH, too) lies on. Needs /proc. Raises OSError."""
    info = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(info, 512)
    finally:
        os.close(info)
    _, _, rest = text.partition(b"mnt_id:")
    return int(rest.split(None, 1)[0])


def is_remote(mount: Mount | None) -> bool:
    """Whether it may stop answering for as long as another process or machine does."""
    return mount is not None and (mount.fstype in _REMOTE or mount.fstype.startswith("fuse."))


class _Table:
    """The mounts that this process sees. Safe to use from several threads."""

    def __init__(self) -> None:
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """A child may close, or has closed, all descriptors."""
        self._fd = -1
        self._lock = threading.Lock()
        self._mounts: dict[int, Mount] = {}

    def find(self, id: int) -> Mount | None:
        with self._lock:
            if self._fd < 0:
                self._fd = os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
                self._poll = select.poll()
                self._poll.register(self._fd, select.POLLPRI)
                self._read()
            elif self._poll.poll(0):
                self._read()
            return self._mounts.get(id)

    def _read(self) -> None:
        """Should it fail, the table is opened anew the next time: what poll(2) has told it does not tell again."""
        try:
            with open(self._fd, "rb", closefd=False) as table:
                table.seek(0)
                self._mounts = {mount.id: mount for mount in map(parse_mount, table)}
        except BaseException:
            fd, self._fd = self._fd, -1
            os.close(fd)
            raise


_table = _Table()


def find_by_id(id: int) -> Mount | None:
    """The mount with this id. None: it is not to be seen from here (detached, outside a chroot, none with a path)."""
    return _table.find(id)
