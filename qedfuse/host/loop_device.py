"""Which file a loop device shows: both are the same bytes, though no lock and no number of the one tells of the other.

Source: Documentation/ABI/testing/sysfs-block-loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from qedfuse.host.file_id import FileId


def files_behind(file: FileId) -> Iterator[FileId]:
    """What is behind a loop device, or a partition of one; what is behind that, if it is a loop device, too; and so
    on. Nothing, if it is something else, or the host does not tell."""
    while file.device == 0:
        behind = _file_behind(file.inode)
        if behind is None:
            return
        yield behind
        file = behind


def _file_behind(number: int) -> FileId | None:
    device = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    for name in (f"{device}/loop/backing_file", f"{device}/../loop/backing_file"):
        with suppress(OSError), open(name, "rb") as file:
            return FileId.at(os.fsdecode(file.read().removesuffix(b"\n")))
    return None
