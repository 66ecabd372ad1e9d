"""Where the daemon of a mount and a command meet: a Unix socket in a directory of the mount's owner, where no other
user can put or replace anything, named after the mount's device number.

    /run/qedfuse                            root's
    /run/user/UID, XDG_RUNTIME_DIR          a user's (in qedfuse/ there)
    /tmp/qedfuse-UID, /tmp/qedfuse-UID-*    where those are missing or read-only: that which is the owner's alone

An abstract socket, whose name belongs to a network namespace and can be taken by any user, is the last resort.

Device numbers come again, and a daemon that was killed leaves its socket behind. A socket is bound and listens before
it gets its name, so one that refuses is such a left one; the lock on the directory is held from the look to the change.
Source: unix(7), file-hierarchy(7), XDG Base Directory Specification.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from qedfuse.host.file_id import FileId
from qedfuse.host.mountinfo import find_by_id, is_remote, mount_id

_ROOT = "/run/qedfuse"
_USERS = "/run/user"
_TEMPORARY = "/tmp"
_NAME = "qedfuse"


def abstract_name(device: str) -> bytes:
    """The abstract address for a mount's "major:minor"."""
    return b"\0qedfuse-" + device.encode("ascii")


def file_name(device: str) -> str:
    """The socket's name in its directory for a mount's "major:minor"."""
    return device.replace(":", "-") + ".sock"


class Address:
    """A socket that has its name. `path` is for people."""

    def __init__(self, directory: int, name: str, path: str) -> None:
        self._directory = directory
        self._name = name
        self._file = FileId.of(os.lstat(name, dir_fd=directory))
        self.path = path

    def release(self) -> None:
        """Take the name away, unless it is a successor's by now."""
        with suppress(OSError), _locked(self._directory):
            if FileId.of(os.lstat(self._name, dir_fd=self._directory)) == self._file:
                os.unlink(self._name, dir_fd=self._directory)
        os.close(self._directory)


def bind(listener: socket.socket, device: str, backlog: int) -> Address:
    """Have `listener` listen for the mount with this device number, whatever had its name before: the number is ours.
    Raises OSError if there is no directory for it."""
    problem: OSError | None = None
    for path in (*_fixed_places(os.geteuid()), None):
        try:
            if path is None:
                path = _make_temporary()
            else:
                _make(path)
            directory = _open_own(path)
        except OSError as error:
            problem = error
            continue
        try:
            return _bind_in(directory, path, listener, device, backlog)
        except OSError as error:
            os.close(directory)
            problem = error
    assert problem is not None
    raise problem


def _bind_in(directory: int, path: str, listener: socket.socket, device: str, backlog: int) -> Address:
    name = file_name(device)
    new = f".{name}.{os.getpid()}"
    with _locked(directory):
        _remove_left(directory, os.listdir(directory))
        try:
            listener.bind(f"/proc/self/fd/{directory}/{new}")
            os.chmod(new, 0o600, dir_fd=directory)
            listener.listen(backlog)
            os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            with suppress(OSError):
                os.unlink(new, dir_fd=directory)
            raise
        return Address(directory, name, os.path.join(path, name))


def find(owner: int, device: str) -> Iterator[str]:
    """Where there is a socket for the mount of user `owner`: an address for each, good until the next is asked for."""
    for path in _places(owner):
        try:
            directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            address = f"/proc/self/fd/{directory}/{file_name(device)}"
            with suppress(OSError, ValueError):
                if _belongs_to(directory, owner) and stat.S_ISSOCK(os.lstat(address).st_mode):
                    yield address
        finally:
            os.close(directory)


def _belongs_to(directory: int, owner: int) -> bool:
    """Whether no user but `owner` (and root) can have put anything there. Asks nothing of a file system that may not
    answer: a user can mount one at any name that is looked at here. Raises OSError."""
    if is_remote(find_by_id(mount_id(directory))):
        return False
    status = os.fstat(directory)
    return status.st_uid == owner and not status.st_mode & 0o022


# -- the directories --------------------------------------------------------------------------------------------------


def _fixed_places(owner: int) -> Iterator[str]:
    if owner == 0:
        yield _ROOT
    yield os.path.join(_USERS, str(owner), _NAME)
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if owner == os.geteuid() and os.path.isabs(runtime):
        with suppress(OSError):  # su(1) may have left another user's
            if os.stat(runtime).st_uid == owner:
                yield os.path.join(runtime, _NAME)


def _places(owner: int) -> Iterator[str]:
    """All that there may be of a user."""
    yield from _fixed_places(owner)
    yield from _temporary_places(owner)


def _temporary_name(owner: int) -> str:
    return f"{_NAME}-{owner}"


def _temporary_places(owner: int) -> Iterator[str]:
    first = _temporary_name(owner)
    with suppress(OSError):
        for name in sorted(os.listdir(_TEMPORARY)):
            if name == first or name.startswith(first + "-"):
                yield os.path.join(_TEMPORARY, name)


def _make(path: str) -> None:
    """Make a directory of ours, in one that is there. Raises OSError."""
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)


def _make_temporary() -> str:
    """One that is ours already, or a new one; a name that a stranger has taken is left to him. Raises OSError."""
    status = os.stat(_TEMPORARY)
    if status.st_uid not in (0, os.geteuid()) or (status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX):
        raise PermissionError(errno.EPERM, "others can rename what is ours there", _TEMPORARY)
    for path in _temporary_places(os.geteuid()):
        with suppress(OSError):
            os.close(_open_own(path))
            return path
    path = os.path.join(_TEMPORARY, _temporary_name(os.geteuid()))
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return tempfile.mkdtemp(prefix=_temporary_name(os.geteuid()) + "-", dir=_TEMPORARY)
    return path


def _open_own(path: str) -> int:
    """A directory that is ours alone. Raises OSError."""
    looked_at = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not _belongs_to(looked_at, os.geteuid()):
            raise PermissionError(errno.EPERM, "it is not ours alone", path)
        return os.open(f"/proc/self/fd/{looked_at}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(looked_at)


@contextmanager
def _locked(directory: int) -> Iterator[None]:
    """Only processes of ours can hold the lock, and none for long."""
    fcntl.flock(directory, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(directory, fcntl.LOCK_UN)


def _remove_left(directory: int, names: Iterable[str]) -> None:
    """Remove sockets on which no process listens any more."""
    for name in names:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(f"/proc/self/fd/{directory}/{name}")
            except ConnectionRefusedError:
                os.unlink(name, dir_fd=directory)
