"""Which parts of a source a conversion shares with its target, instead of copying them.

On btrfs and XFS two files can have the same blocks, until one of them is written to. That takes no space and hardly any
time, however much it is. What can be shared is what a layer of the source stores byte for byte, in whole blocks that
lie as they shall lie in the target; the rest (the ends of runs, compressed clusters) is copied. Zeroes inside are not
looked for: they take no space either.

A file whose blocks the host has once refused to share (it is on another file system, or that knows nothing of it) is
not asked for again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator
from enum import StrEnum
from typing import NamedTuple

from qedfuse.errors import QedfuseError
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.reflink import REFUSALS
from qedfuse.layers.layer import Layer
from qedfuse.layers.resolve import Extent, resolve
from qedfuse.layers.runs import Kind
from qedfuse.sizes import round_down, round_up
from qedfuse.tools.convert_target import FileTarget

#: So much of a disk is looked up at a time.
_LOOKUP = 256 << 20

_REASONS = {
    errno.EXDEV: "they are on different file systems",
    **dict.fromkeys((errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS), "the file system has no shared blocks"),
}


class Reflink(StrEnum):
    """Whether blocks are shared: where that can be, or else the conversion fails, or not at all."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Piece(NamedTuple):
    """A range of the guest, in bytes, and whether it is shared now or is to be copied."""

    start: int
    end: int
    shared: bool


class Sharing:
    """What the chain from `source` down has is shared with `target`, whose file is at `path`. With `always` an error
    tells what keeps it from that."""

    def __init__(self, source: Layer, target: FileTarget, path: str, *, always: bool) -> None:
        self._source = source
        self._target = target
        self._path = path
        self._always = always
        self._refused: set[Layer] = set()

    async def share(self, start: int, end: int) -> AsyncGenerator[Piece, None]:
        """Go through a range: share what can be, and tell of each piece in order. A piece that is to be copied must
        have been copied when the next one is asked for. Raises OSError."""
        copied = start  # what is before has been told of
        for first in range(start, end, _LOOKUP):
            for extent in await resolve(self._source, first, min(_LOOKUP, end - first)):
                position, stop = self._whole_blocks(extent)
                while position < stop:
                    if copied < position:
                        yield Piece(copied, position, shared=False)
                        copied = position
                    shared = await self._share(extent, position, stop)
                    if not shared:
                        break
                    position = copied = position + shared
                    yield Piece(position - shared, position, shared=True)
        if copied < end:
            yield Piece(copied, end, shared=False)

    def _whole_blocks(self, extent: Extent) -> tuple[int, int]:
        """The part of an extent that may be shared, as far as its own layer is concerned."""
        offset, length, kind, layer, host = extent
        if kind is not Kind.DATA or layer in self._refused:
            return offset, offset
        block = self._target.block_size
        shift = offset - host
        return round_up(host, block) + shift, round_down(host + length, block) + shift

    async def _share(self, extent: Extent, start: int, end: int) -> int:
        """Share the front of [start, end), a part of `extent`. Returns how many bytes of it are shared."""
        layer = extent.layer
        assert layer is not None
        storage = layer.storage
        if not isinstance(storage, FileStorage) or storage.fixed:
            return self._refuse(layer, "it is no regular file")
        host = extent.host + start - extent.offset
        size = min(end - start, round_down(storage.size() - host, self._target.block_size))
        if size <= 0:
            return 0  # a last block that is not full; or the file has shrunk, which reading will tell
        try:
            shared = await self._target.share(start, storage, host, size)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            code = error.errno or 0
            return self._refuse(layer, _REASONS.get(code, os.strerror(code)))
        if not shared and self._always:
            raise self._error(layer, "what is to be shared does not lie alike on their blocks")
        return shared

    def _refuse(self, layer: Layer, reason: str) -> int:
        if self._always:
            raise self._error(layer, reason)
        self._refused.add(layer)
        return 0

    def _error(self, layer: Layer, reason: str) -> QedfuseError:
        message = f"cannot share blocks with {layer.path}: {reason}; use --reflink=auto to copy them"
        return QedfuseError(self._path, message, errno.EOPNOTSUPP)
