"""File systems of a host, on loop devices: where images and their copies lie."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.mounts.guests import MKFS, filesystem, need_filesystem, need_guest, run

_SHARED = "shared"


@contextmanager
def host_of(kind: str, disk: Path, size: int) -> Iterator[Path]:
    """A new file system of so many bytes in the file `disk`, mounted next to it. Skips where there is none."""
    need_guest(f"mkfs.{kind}")
    need_filesystem(kind)
    with disk.open("wb") as file:
        file.truncate(size)
    subprocess.run([*MKFS[kind], disk], check=True, timeout=60)
    with filesystem(disk, disk.with_suffix(".mounted"), "-o", "loop") as point:
        yield point


def used(point: Path) -> int:
    """Bytes that the file system has given away, all of it being on the disk."""
    run("sync", "-f", point)
    status = os.statvfs(point)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def shared(path: Path) -> int:
    """Bytes of a file that others have, too, as filefrag tells."""
    run("sync", path)
    found = 0
    for line in run("filefrag", "-v", "-b1", path).splitlines():
        columns = [column.strip() for column in line.split(":")]
        if columns[0].isdecimal() and _SHARED in columns[-1]:
            found += int(columns[3])
    return found
