"""From an untrusted name to an open file, a component at a time, and never into a mount of ours.

A process that looks a name up in a FUSE mount waits for the daemon behind it: for itself, or for one that waits for it
in turn. No signal ends that. The kernel follows a whole path at once, so here each component is pinned by itself
(O_PATH, which asks a mount's daemon nothing), judged by the mount that it lies on, and only then entered. Symbolic
links are read and followed by hand.

What the walk has come through stays pinned until it ends. ".." goes back to where it came from, so that a walk that is
confined to a directory has never left it, whatever is renamed meanwhile.

Source: path_resolution(7), open(2) on O_PATH, proc(5) on magic links and protected_symlinks.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from qedfuse.host.file_id import FileId
from qedfuse.host.lookups import cannot_tell, enter
from qedfuse.host.mountinfo import find_by_id, mount_id

#: As many symbolic links as the kernel follows.
_MAX_LINKS = 40
#: Directories inside each other, and components in all, links' included.
_MAX_DEPTH = 256
_MAX_STEPS = 8192

_PIN = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class LeadsBackError(OSError):
    """The name leads into a qedfuse mount at `mountpoint`."""

    def __init__(self, mountpoint: str) -> None:
        super().__init__(errno.ELOOP, os.strerror(errno.ELOOP))
        self.mountpoint = mountpoint


class _Pin(NamedTuple):
    """`mount`: the id of the one it lies on, and `fstype` its type, None if that mount is not to be seen from here.

    `inside`: it is the root that confines the walk, or below it. `forbidden`: why nothing may be asked of it.
    """

    fd: int
    mount: int
    fstype: str | None
    inside: bool
    forbidden: OSError | None


class Walk:
    """One walk; a context manager that lets go of all it has pinned.

    `root`: the directory that confines it, if any. `inside` tells whether the walk is in there now: to be
    asked before what was found is opened, also when the walk has failed.
    """

    def __init__(self, root: str | None = None) -> None:
        self._pins: list[_Pin] = []
        self._links = 0
        self._steps = 0
        self._root_fd = -1
        self._root: tuple[int, FileId] | None = None
        if root is not None:
            self._root_fd = _open_trusted(root)
            try:
                self._root = mount_id(self._root_fd), FileId.of(os.fstat(self._root_fd))
            except BaseException:
                os.close(self._root_fd)
                raise

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._let_go()
        if self._root_fd >= 0:
            os.close(self._root_fd)

    @property
    def inside(self) -> bool:
        return self._root is None or (bool(self._pins) and self._pins[-1].inside)

    def start(self, directory: str) -> None:
        """Begin in a directory whose name can be trusted. Raises OSError, LeadsBackError, NoAnswerError."""
        self._restart(_open_trusted(directory))
        self._check()

    def branch(self) -> Walk:
        """Another walk, which begins where this one is."""
        walk = Walk()
        walk._pins.append(self._pins[-1]._replace(fd=os.dup(self._pins[-1].fd)))
        return walk

    @property
    def fd(self) -> int:
        """A descriptor (O_PATH) of the place where the walk is, which the walk owns."""
        return self._pins[-1].fd

    def follow(self, path: str) -> int:
        """Go on from here, or from the root directory if `path` is absolute; a walk that was not started begins in the
        working directory. Returns `fd`. Raises OSError, LeadsBackError, NoAnswerError.
        """
        if not self._pins and not path.startswith("/"):
            path = self._begin_here(path)
        pending = self._parse(path)
        while pending:
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            name = pending.pop()
            if name == "..":
                self._leave()
            elif name == ".":
                self._check_directory()
            else:
                self._step(name, pending)
        here = self._pins[-1]
        if here.forbidden is not None and here.fstype is not None:
            raise here.forbidden
        return here.fd

    def _begin_here(self, path: str) -> str:
        """The working directory may itself be in a mount of ours, and be left by ".."."""
        if self._root is None:
            self._restart(_open_trusted("."))
            if self._pins[-1].forbidden is None:
                return path
        return os.path.join(os.getcwd(), path)

    def _parse(self, path: str) -> list[str]:
        """The components, last one first. A slash at the end asks for a directory."""
        if not path:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if path.startswith("/"):
            self._restart(_open_trusted("/"))
        names = [name for name in path.split("/") if name]
        if path.endswith("/"):
            names.append(".")
        return names[::-1]

    # -- steps --------------------------------------------------------------------------------------------------------

    def _step(self, name: str, pending: list[str]) -> None:
        here = self._check()
        self._push(os.open(name, _PIN, dir_fd=here.fd))
        if pending and self._pins[-1].fstype == "autofs":
            self._mount_on_demand(name, here)
        target = self._read_link()
        if target is None:
            return
        self._links += 1
        if self._links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        self._check_may_follow(here)
        self._pop()
        if here.fstype == "proc":  # /proc/self/fd/3 says something else than it leads to, and leads there at once
            self._restart(os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=here.fd), trusted=False)
        else:
            pending.extend(self._parse(target))

    def _mount_on_demand(self, name: str, here: _Pin) -> None:
        """With O_DIRECTORY the kernel mounts what belongs here. A link or a file is none of that."""
        try:
            fd = os.open(name, _PIN | os.O_DIRECTORY, dir_fd=here.fd)
        except NotADirectoryError:
            return
        try:
            self._pop()
        except BaseException:
            os.close(fd)
            raise
        self._push(fd)

    def _read_link(self) -> str | None:
        """What the last pin says, if it is a symbolic link."""
        pin = self._pins[-1]
        if pin.forbidden is not None:
            return None
        try:
            return os.readlink("", dir_fd=pin.fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINVAL):  # it is none
                return None
            raise

    def _check_may_follow(self, directory: _Pin) -> None:
        """As the kernel does it: in a directory like /tmp only one's own links, and those of its owner."""
        where = os.fstat(directory.fd)
        shared = stat.S_ISVTX | stat.S_IWOTH
        if where.st_mode & shared != shared:
            return
        owner = os.fstat(self._pins[-1].fd).st_uid
        if owner not in (os.geteuid(), where.st_uid) and _links_are_protected():
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def _leave(self) -> None:
        """ ".."."""
        if self._pins[-1].forbidden is None:
            self._check_directory()
        if len(self._pins) > 1:
            self._pop()
        else:
            here = self._check()
            self._restart(os.open("..", _PIN | os.O_DIRECTORY, dir_fd=here.fd), trusted=False)

    def _check_directory(self) -> None:
        os.close(os.open(".", _PIN | os.O_DIRECTORY, dir_fd=self._check().fd))

    def _check(self) -> _Pin:
        """Where the walk is, if that may be asked for anything."""
        here = self._pins[-1]
        if here.forbidden is not None:
            raise here.forbidden
        return here

    # -- pins ---------------------------------------------------------------------------------------------------------

    def _restart(self, fd: int, *, trusted: bool = True) -> None:
        """Go on from somewhere else."""
        self._let_go()
        self._push(fd, trusted=trusted)

    def _push(self, fd: int, *, trusted: bool = False) -> None:
        """Take a new pin. What mount it lies on is known before anything is asked of it."""
        try:
            pin = self._judge(fd, trusted)
            if len(self._pins) >= _MAX_DEPTH:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        except BaseException:
            os.close(fd)
            raise
        self._pins.append(pin)

    def _judge(self, fd: int, trusted: bool) -> _Pin:
        """`trusted`: it may lie on a mount that is not to be seen."""
        above = self._pins[-1] if self._pins else None
        mount = mount_id(fd)
        forbidden: OSError | None = None
        if above is not None and above.mount == mount:
            fstype, forbidden = above.fstype, above.forbidden
        else:
            found = find_by_id(mount)
            fstype = found.fstype if found else None
            if found is not None and found.is_qedfuse:
                forbidden = LeadsBackError(found.mountpoint)
            elif found is None and not trusted and mount != _root_mount():
                forbidden = OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            enter(mount)
        inside = above is not None and above.inside
        if self._root is not None and not inside and mount == self._root[0] and forbidden is None:
            inside = (mount, FileId.of(os.fstat(fd))) == self._root
        return _Pin(fd, mount, fstype, inside, forbidden)

    def _pop(self) -> None:
        os.close(self._pins.pop().fd)
        enter(self._pins[-1].mount)

    def _let_go(self) -> None:
        while self._pins:
            os.close(self._pins.pop().fd)


def _root_mount() -> int:
    """In a chroot it may be one that is not to be seen."""
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return mount_id(fd)
    finally:
        os.close(fd)


def _open_trusted(directory: str) -> int:
    enter(("directory", directory))
    return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _links_are_protected() -> bool:
    try:
        with open("/proc/sys/fs/protected_symlinks", "rb") as file:
            return file.read(1) != b"0"
    except OSError as error:
        if cannot_tell(error):
            raise
        return True
