"""Blocks of a buffer: which of them are zeroes, which are the same as in another one. Pure.

A block's place is counted from the buffer's start; the last one may be cut off. Sizes are multiples of 8 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby


def are_data(buffer: memoryview, block: int) -> list[bool]:
    """For every block whether anything in it is not zero.

    The first word of nearly every block of data is not zero, and looking at those alone is quick.
    """
    heads: list[int] = buffer.cast("Q")[:: block >> 3].tolist()
    if 0 not in heads:
        return [True] * len(heads)
    zeroes = bytes(block)
    return [
        head != 0 or not zeroes.startswith(buffer[index * block : (index + 1) * block])  # compares without a copy
        for index, head in enumerate(heads)
    ]


def differ(one: memoryview, other: memoryview, block: int) -> list[bool]:
    """For every block whether the two buffers, of one size, differ in it."""
    starts = range(0, len(one), block)
    return [one[start : start + block].tobytes() != other[start : start + block].tobytes() for start in starts]


def runs(flags: Sequence[bool], block: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """Blocks as runs (start, end, flag) of neighbours with one flag, in bytes of a buffer of `size`."""
    if flags and all(flags):  # the common case
        yield 0, size, True
        return
    first = 0
    for flag, group in groupby(flags):
        end = first + sum(1 for _ in group)
        yield first * block, min(end * block, size), flag
        first = end
