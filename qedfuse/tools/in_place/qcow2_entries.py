"""qcow2 L2 entries as QED's. Pure: no I/O.

Nearly all entries are offsets with a flag to be taken off: a chunk of a table is turned over one byte of all entries at
a time, and one by one only those are treated that are something else.

Source: QEMU docs/interop/qcow2, "L2 table entry"; docs/interop/qed_spec, "Data cluster offset".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from qedfuse.errors import CorruptError
from qedfuse.host.chunks import pack_entry
from qedfuse.layers.qcow2.entries import ENTRY_COMPRESSED, ENTRY_OFFSET, ENTRY_ZERO
from qedfuse.layers.qcow2.header import Qcow2Header
from qedfuse.qed.geometry import UNALLOCATED, ZERO_CLUSTER
from qedfuse.sizes import ENTRY_SIZE

_ENTRY = struct.Struct(">Q")
#: Of an entry's first and last byte, as they are in the file: those without the flags.
_PLAIN_HEADS = bytes(byte for byte in range(256) if not byte << 56 & ENTRY_COMPRESSED)
_PLAIN_TAILS = bytes(byte for byte in range(256) if not byte & ENTRY_ZERO)
#: And of the last byte but one: what is offset in it.
_OFFSET = bytes(byte & ENTRY_OFFSET >> 8 & 0xFF for byte in range(256))


class Translated(NamedTuple):
    """`entries`: QED's, as bytes. `compressed`: which of them need a new cluster, and are 0 until they have it: their
    positions (in entries) and what qcow2 has there."""

    entries: bytearray
    compressed: list[tuple[int, int]]


def translate(chunk: bytes | bytearray, header: Qcow2Header, first: int, path: str) -> Translated:
    """`chunk` is a part of an L2 table, from guest cluster (a number) `first` on. `path` is for messages.

    Whether offsets are aligned and inside the file is left to `ClusterMap.mark_entries`. Raises CorruptError.
    """
    entries = bytearray(len(chunk))
    entries[1::ENTRY_SIZE] = chunk[6::ENTRY_SIZE].translate(_OFFSET)
    for byte in range(2, 7):
        entries[byte::ENTRY_SIZE] = chunk[7 - byte :: ENTRY_SIZE]
    result = Translated(entries, [])
    heads, tails = chunk[::ENTRY_SIZE], chunk[7::ENTRY_SIZE]
    if heads.translate(None, _PLAIN_HEADS) or tails.translate(None, _PLAIN_TAILS):
        for number, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            if head << 56 & ENTRY_COMPRESSED:
                pack_entry(entries, number, UNALLOCATED)
                result.compressed.append((number, _ENTRY.unpack_from(chunk, number * ENTRY_SIZE)[0]))
            elif tail & ENTRY_ZERO:
                if header.version < 3:
                    guest = (first + number) << header.cluster_bits
                    raise CorruptError(path, f"the l2 entry of guest offset {guest} has a flag of version 3")
                pack_entry(entries, number, ZERO_CLUSTER)
    return result
