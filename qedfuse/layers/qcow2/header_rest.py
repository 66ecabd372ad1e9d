"""What a qcow2 header says that a reader need not mind, but a program that takes the file over must. Pure: no I/O.

Source: QEMU docs/interop/qcow2, "Header", "Header extensions", "Bitmaps extension".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from qedfuse.errors import FormatError
from qedfuse.layers.qcow2.header import (
    INCOMPATIBLE_DIRTY,
    V2_BYTES,
    Qcow2Header,
    decode_v3,
    extensions,
)
from qedfuse.sizes import SECTOR_SIZE

_NAME = struct.Struct(">QI")
_NAME_AT = 8
_SNAPSHOTS = struct.Struct(">I")
_SNAPSHOTS_AT = 60
_BITMAPS = struct.Struct(">I")
_EXTENSION_BITMAPS = 0x23852875


@dataclass(frozen=True)
class HeaderRest:
    """`snapshots` and `bitmaps` are numbers of them. `dirty`: the refcounts may be stale.

    `free`: ranges (start, end) of the first cluster, behind the first sector, that neither the header nor an extension
    nor the backing file's name takes.
    """

    snapshots: int
    dirty: bool
    bitmaps: int
    free: tuple[tuple[int, int], ...]

    @classmethod
    def decode(cls, raw: bytes, header: Qcow2Header, path: str) -> HeaderRest:
        """Of a file's first cluster `raw` (shorter if the file is), whose `header` is decoded.

        Raises FormatError for extensions that are cut off.
        """
        start, dirty = V2_BYTES, False
        if header.version >= 3:
            incompatible, start = decode_v3(raw)
            dirty = bool(incompatible & INCOMPATIBLE_DIRTY)
        name, name_size = _NAME.unpack_from(raw, _NAME_AT)
        limit = min(len(raw), header.cluster_size)
        bitmaps, end = 0, start
        for kind, data, length in extensions(raw, start, name or limit, path):
            end = data + length
            if kind == _EXTENSION_BITMAPS:
                if length < _BITMAPS.size:
                    raise FormatError(path, f"the bitmaps extension at {data} is cut off")
                bitmaps = _BITMAPS.unpack_from(raw, data)[0]
        taken = sorted([(0, SECTOR_SIZE), (0, end), (name, name + name_size if name else 0)])
        free = []
        position = 0
        for first, past in [*taken, (limit, limit)]:
            if first > position:
                free.append((position, first))
            position = max(position, past)
        return cls(_SNAPSHOTS.unpack_from(raw, _SNAPSHOTS_AT)[0], dirty, bitmaps, tuple(free))

    def room(self, size: int) -> int | None:
        """Where `size` bytes fit, None if nowhere."""
        return next((start for start, end in self.free if end - start >= size), None)
