"""Which file it is, whatever name led to it, and in what state it is."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple


class FileId(NamedTuple):
    """Two files are one if their ids are equal: `device` and `inode` as stat(2) has them. Of a block device, for which
    any number of nodes may stand, 0 and its own number: no file lies on a device of number 0."""

    device: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileId:
        if stat.S_ISBLK(status.st_mode):
            return cls(0, status.st_rdev)
        return cls(status.st_dev, status.st_ino)

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> FileId:
        """What is at `path`, symbolic links followed. Raises OSError."""
        return cls.of(os.stat(path))


class FileMark(NamedTuple):
    """In what state a file is: time of change in nanoseconds, size in bytes, and a time that cannot be set."""

    mtime_ns: int
    size: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileMark:
        return cls(status.st_mtime_ns, status.st_size, status.st_ctime_ns)
