"""Which mount an open file lies on, without asking its file system.

A stat(2) of a file in a FUSE mount waits for the daemon behind it. What is here is answered by the kernel alone: the
mount's id from fdinfo, and what is mounted under it from mountinfo. The kernel tells by poll(2) when mountinfo has
changed, so it is read again only then; an id is not given to another mount while a descriptor refers to it.

Source: proc_pid_fdinfo(5), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import select
import threading

from qedfuse.host.mountinfo import Mount, parse_mount

#: File systems behind which there is another process or machine, which may stop answering. With "fuse." and a word
#: behind it they are any FUSE file system's.
_REMOTE = frozenset(
    (
        *("fuse", "fuseblk", "virtiofs", "9p", "vboxsf", "nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs"),
        *("ceph", "coda", "lustre", "gpfs", "ocfs2", "gfs2", "glusterfs", "beegfs", "orangefs", "pvfs2", "autofs"),
    )
)


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
                self._fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
                self._poll = select.poll()
                self._poll.register(self._fd, select.POLLPRI)
                self._read()
            elif self._poll.poll(0):
                self._read()
            return self._mounts.get(id)

    def _read(self) -> None:
        with open(self._fd, "rb", closefd=False) as table:
            table.seek(0)
            self._mounts = {mount.id: mount for mount in map(parse_mount, table)}


_table = _Table()


def find_by_id(id: int) -> Mount | None:
    """The mount with this id. None: it is not to be seen from here (detached, outside a chroot, none with a path)."""
    return _table.find(id)
