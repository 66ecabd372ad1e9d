"""Another size for the disk in a file, raw or qed.

What is cut off is gone, and what is added reads as zeroes. A crash leaves the old size or the new one: a raw file
changes with one system call, and what a qed image needs besides its header is decided in `qed/commit.py`.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from qedfuse.chain.format_probe import PROBE_BYTES, QED, RAW, probe_format
from qedfuse.chain.opening import open_image
from qedfuse.chain.policy import ANY_BACKING, BackingPolicy
from qedfuse.chain.unfinished import claim_for_writing
from qedfuse.errors import QedfuseError, UnsupportedError
from qedfuse.host.closing import closing
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.storage import read, size_in_sectors
from qedfuse.sizes import MAX_OFFSET, SECTOR_SIZE, round_up


class NewSize(NamedTuple):
    """`size` bytes; with a `sign` of 1 or -1, so many more or less than now."""

    sign: int
    size: int

    def of(self, current: int) -> int:
        return self.size if self.sign == 0 else current + self.sign * self.size


async def resize_image(
    path: str,
    wanted: NewSize,
    *,
    format: str | None = None,
    may_shrink: bool = False,
    policy: BackingPolicy = ANY_BACKING,
) -> str:
    """Give the disk in `path` another size, rounded up to 512; durable on return. Returns the format.

    `format` None: probed. Raises QedfuseError, with nothing changed: the disk would shrink and may not, would be empty,
    or larger than its geometry can map (EFBIG); InUseError, OSError. Cancelled, it has its old size or the new one.
    """
    format = format or await _probe(path)
    if format == RAW:
        await _resize_raw(path, wanted, may_shrink)
    elif format == QED:
        async with open_image(path, policy=policy) as image:
            await image.resize(_new_size(path, wanted, image.size, may_shrink))
            await image.flush()
    else:
        raise UnsupportedError(path, f"is a {format} image, and only qed and raw ones are resized; qemu-img resizes it")
    return format


async def _probe(path: str) -> str:
    async with closing(FileStorage.open(path, writable=False)) as storage:
        return probe_format(await read(storage, 0, min(PROBE_BYTES, storage.size())), path)


async def _resize_raw(path: str, wanted: NewSize, may_shrink: bool) -> None:
    async with closing(FileStorage.open(path, writable=True)) as storage:
        claim_for_writing(storage.fileno(), path)
        if storage.fixed:
            raise QedfuseError(path, "is a block device, and stays as large as it is", errno.EINVAL)
        size = _new_size(path, wanted, size_in_sectors(storage), may_shrink)
        if size > MAX_OFFSET:
            raise QedfuseError(path, f"file too large: a file has at most {MAX_OFFSET} bytes", errno.EFBIG)
        await storage.truncate(size)
        await storage.sync()


def _new_size(path: str, wanted: NewSize, current: int, may_shrink: bool) -> int:
    size = wanted.of(current)
    if size <= 0:
        raise QedfuseError(path, "new image size must be positive", errno.EINVAL)
    size = round_up(size, SECTOR_SIZE)
    if size < current and not may_shrink:
        raise QedfuseError(
            path,
            f"use the --shrink option to perform a shrink operation, from {current} to {size} bytes: "
            "what lies behind the new end will be deleted",
            errno.EINVAL,
        )
    return size
