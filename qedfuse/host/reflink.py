"""Blocks that several files share ("reflinks"), as btrfs and XFS have them: made, and found.

Source: ioctl_ficlonerange(2), linux/fs.h; Documentation/filesystems/fiemap.rst, linux/fiemap.h.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from typing import NamedTuple

_FICLONERANGE = 0x4020940D
_RANGE = struct.Struct("=qQQQ")  # source, its offset, length, offset here

_FIEMAP = 0xC020660B
_MAP = struct.Struct("=QQIIII")  # start, length, flags, extents found, room for extents, reserved
_EXTENT = struct.Struct("=QQQ16xI12x")  # start, place on the disk, length, flags
_EXTENT_LAST = 0x1
_EXTENT_SHARED = 0x2000
#: Extents that are asked for: one call, of a millisecond at most.
_EXTENTS = 512

#: What a file system says that cannot share these blocks, whatever the reason.
REFUSALS = frozenset(
    (
        *(errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL),
        *(errno.ETXTBSY, errno.EPERM, errno.EBADF, errno.EMLINK),
    )
)


def clone_range(fd: int, offset: int, source: int, start: int, size: int) -> None:
    """Let `size` bytes from `offset` of a file be those from `start` of another one, of which it shares the blocks.

    All three are multiples of the file system's blocks, and `size` is not 0. Blocks until both are done. Raises
    OSError, one of `REFUSALS` if that cannot be, or the source is shorter; what it has done until then is not told.
    """
    fcntl.ioctl(fd, _FICLONERANGE, _RANGE.pack(source, start, size, offset))


class SharedBytes(NamedTuple):
    """How much of a file other files have, too. `all`: of the whole file; otherwise it may be more."""

    size: int
    all: bool


NOT_SHARED = SharedBytes(0, True)


def shared_bytes(fd: int) -> SharedBytes:
    """Bytes of a file whose blocks are shared, as far as the file system tells at once, or at all."""
    room = _MAP.size + _EXTENTS * _EXTENT.size
    question = bytearray(_MAP.pack(0, (1 << 64) - 1, 0, 0, _EXTENTS, 0)).ljust(room, b"\0")
    try:
        fcntl.ioctl(fd, _FIEMAP, question)
    except OSError:
        return NOT_SHARED
    count = _MAP.unpack_from(question)[3]
    extents = list(_EXTENT.iter_unpack(question[_MAP.size : _MAP.size + count * _EXTENT.size]))
    size = sum(length for _start, _place, length, flags in extents if flags & _EXTENT_SHARED)
    return SharedBytes(size, not extents or bool(extents[-1][3] & _EXTENT_LAST))
