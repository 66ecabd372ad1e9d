"""Reference counts of a qcow2 image that are above one. Pure: no I/O.

Source: QEMU docs/interop/qcow2, "Host cluster management": numbers of 1 to 64 bits, big-endian; those smaller than a
byte fill it from its lowest bits up.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from functools import cache

from qedfuse.host.chunks import CHUNK_SIZE

_TYPES = {8: "B", 16: "H", 32: "I", 64: "Q"}


def above_one(chunk: bytes | bytearray, bits: int) -> Iterator[tuple[int, int]]:
    """Position and value of every count above one in at most CHUNK_SIZE of a block, whose counts have `bits` bits.

    If there is none, which is the rule, that is known at once.
    """
    if int.from_bytes(chunk, "little") & _all_but_lowest_bits(bits):
        for position, count in enumerate(_counts(chunk, bits)):
            if count > 1:
                yield position, count


def end_of_counts(chunk: bytes | bytearray) -> int:
    """The bit of a chunk behind the last one that is not 0, in whole bytes or, of counts smaller than that, exactly."""
    return int.from_bytes(chunk, "little").bit_length()


@cache
def _all_but_lowest_bits(bits: int) -> int:
    """A chunk of counts, as one number: all bits are set but the lowest of each count."""
    count = (1 << bits) - 2
    unit = count.to_bytes(bits // 8, "big") if bits >= 8 else sum(count << at for at in range(0, 8, bits)).to_bytes()
    return int.from_bytes(unit * (CHUNK_SIZE // len(unit)), "little")


def _counts(chunk: bytes | bytearray, bits: int) -> Sequence[int]:
    if bits < 8:
        mask = (1 << bits) - 1
        return [byte >> at & mask for byte in chunk for at in range(0, 8, bits)]
    counts = array(_TYPES[bits], bytes(chunk))
    if sys.byteorder == "little":
        counts.byteswap()
    return counts
