"""fallocate(2) on an image: holes made, room found.

Source: fallocate(2).
"""

from __future__ import annotations

import errno
import os
from contextlib import aclosing

from qedfuse.host.file_storage import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, FileStorage
from qedfuse.layers.mapping import walk
from qedfuse.qed.image import Image


async def fallocate(image: Image, mode: int, offset: int, size: int) -> None:
    """fallocate(2) on the raw file. Bytes; `mode` as there. Raises OSError; EOPNOTSUPP for what cannot be done here.

    PUNCH_HOLE and ZERO_RANGE make the range read as zeroes and deallocate it where the host can. ZERO_RANGE past the
    end grows the image, unless KEEP_SIZE is given.

    Preallocation (mode 0) grows the image if the range ends past its end. It reserves nothing, as on other file systems
    that allocate on write, but is refused with ENOSPC if what the range lacks does not fit on the host now.
    """
    keep_size = bool(mode & FALLOC_FL_KEEP_SIZE)
    action = mode & ~FALLOC_FL_KEEP_SIZE
    if action not in (0, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE) or mode == FALLOC_FL_PUNCH_HOLE:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    if action == 0:
        await _check_space(image, offset, size)
    if not keep_size and offset + size > image.size:
        await image.resize(offset + size)
    if action != 0:
        await image.zero(offset, size)


async def _check_space(image: Image, offset: int, size: int) -> None:
    """Is there room on the host for what a range lacks?"""
    if not isinstance(image.storage, FileStorage):
        return
    room = await image.measure_room()
    if room is None:
        host = await image.storage.statvfs()
        if not host.f_blocks:  # ramfs and some FUSE file systems do not say: as much as there is
            return
        room = host.f_bavail * host.f_frsize
    missing = max(0, offset + size - max(offset, image.size))
    end = min(offset + size, image.size)
    async with aclosing(walk(image, offset, max(offset, end), below=False)) as entries:
        async for entry in entries:
            missing += 0 if entry.data else entry.length
            if missing > room:
                break
    if missing > room:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
