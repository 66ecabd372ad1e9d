"""A look at an image without opening it: the 64 bytes of its header. Blocks: to be called in a worker thread.

A directory of thousands of images is listed by this alone, and what a look found is kept until the file changes.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable
from typing import NamedTuple

from qedfuse.errors import QedfuseError
from qedfuse.header import HEADER_BYTES, MAGIC, Header

#: Which file, and in what state: device and inode, time of change in nanoseconds, size in bytes.
FileKey = tuple[int, int]
FileMark = tuple[int, int]

#: As many symbolic links as the kernel follows.
_MAX_LINKS = 40


class Peek(NamedTuple):
    """What a look found. `is_qed`: it begins as QED does; `header`: None if it cannot be read or is not valid.

    `time`: when the look began (`time.monotonic`). `writable`: the file may be written by this process.
    """

    time: float
    status: os.stat_result
    is_qed: bool
    header: Header | None
    writable: bool

    @property
    def size(self) -> int:
        """Bytes of the raw file; 0 if the header does not tell."""
        return self.header.image_size if self.header else 0


class _Known(NamedTuple):
    mark: FileMark
    is_qed: bool
    header: Header | None


def key_of(status: os.stat_result) -> FileKey:
    return status.st_dev, status.st_ino


def mark_of(status: os.stat_result) -> FileMark:
    return status.st_mtime_ns, status.st_size


class Peeker:
    """Looks at images, and remembers. Safe to use from several threads.

    `mountpoint`: symbolic links that lead there are not followed. Whoever asks the mount for a file while the mount
    asks for that link waits for himself.
    """

    def __init__(self, mountpoint: str = "") -> None:
        self._mountpoint = mountpoint
        self._known: dict[FileKey, _Known] = {}

    def look(self, path: str) -> Peek | None:
        """What is at `path`; None if it is no regular file, or nothing."""
        now = time.monotonic()
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                if self._leads_back(path):
                    return None
                status = os.stat(path)
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        key = key_of(status)
        known = self._known.get(key)
        if known is None or known.mark != mark_of(status):
            known = self._known[key] = _Known(mark_of(status), *_read_header(path))
        writable = os.access(path, os.W_OK, effective_ids=True)
        return Peek(now, status, known.is_qed, known.header, writable)

    def _leads_back(self, path: str) -> bool:
        """Whether a chain of links ends in the mount, as far as the names tell. Raises OSError for an endless one."""
        for _ in range(_MAX_LINKS):
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
            if os.path.commonpath((path, self._mountpoint or path)) == self._mountpoint:
                return True
            if not os.path.islink(path):
                return False
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)

    def keep_only(self, keys: Iterable[FileKey]) -> None:
        """Forget files that are gone."""
        self._known = {key: self._known[key] for key in keys if key in self._known}


def _read_header(path: str) -> tuple[bool, Header | None]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return False, None
    try:
        raw = os.pread(fd, HEADER_BYTES, 0)
    except OSError:
        return False, None
    finally:
        os.close(fd)
    try:
        return raw.startswith(MAGIC), Header.decode(raw, path)
    except QedfuseError:
        return raw.startswith(MAGIC), None
