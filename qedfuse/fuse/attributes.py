"""What stat(2) says of a raw file: who may do what as the image file says, the size and space of what it stands for.

Pure but for `host_blocks`. Source: stat(2).
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from qedfuse.fuse.options import MountOptions
from qedfuse.host.storage import held_bytes
from qedfuse.layers.layer import Layer, layers_of

BLOCK_SIZE = 512


class Attributes(NamedTuple):
    """The st_* fields. `size` in bytes, `blocks` in units of 512 bytes, times in nanoseconds."""

    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


def raw_attributes(
    status: os.stat_result, size: int, blocks: int, *, writable: bool, options: MountOptions
) -> Attributes:
    """The raw file of an image with `status`; `size` in bytes, `blocks` those that its chain takes on the host.

    Owner and permissions are the image's, without any x, and without any w where nothing can be written. `blocks` never
    exceeds the size, so that no tool takes metadata for data, and is 0 only for an empty file: some tools skip the data
    of a file that has none.
    """
    permissions = stat.S_IMODE(status.st_mode) & 0o666
    if options.umask is not None:
        permissions = 0o666 & ~options.umask
    if not writable:
        permissions &= ~0o222
    limit = -(-size // BLOCK_SIZE)
    return _with_owner(status, options, stat.S_IFREG | permissions, 1, size, max(min(blocks, limit), min(1, limit)))


def directory_attributes(status: os.stat_result, options: MountOptions) -> Attributes:
    """The directory of the raw files; `status` is that of a directory it stands for, or of the mountpoint."""
    permissions = stat.S_IMODE(status.st_mode) & 0o777
    if options.umask is not None:
        permissions = 0o777 & ~options.umask
    return _with_owner(status, options, stat.S_IFDIR | (permissions & ~0o222), 2, 0, 0)


def _with_owner(
    status: os.stat_result, options: MountOptions, mode: int, nlink: int, size: int, blocks: int
) -> Attributes:
    return Attributes(
        mode=mode,
        nlink=nlink,
        uid=status.st_uid if options.uid is None else options.uid,
        gid=status.st_gid if options.gid is None else options.gid,
        size=size,
        blocks=blocks,
        atime_ns=status.st_atime_ns,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
    )


def host_blocks(top: Layer) -> int:
    """Blocks of 512 bytes that an open image and its backing files take on the host."""
    return sum(held_bytes(layer.storage) // BLOCK_SIZE for layer in layers_of(top))
