"""Which ranges of a disk a conversion copies: those with data, or those that may differ from the target's backing file,
widened to whole blocks. What lies between them is all zeroes, or the same.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from qedfuse.host.file_id import FileId
from qedfuse.layers.layer import Layer, layers_of
from qedfuse.layers.mapping import MapEntry, walk
from qedfuse.sizes import round_down, round_up

#: Bytes of a range to copy after which it is begun with, before more of the map is read.
_MOST = 64 << 20

#: (start, end, whether to copy), in bytes of the guest.
Range = tuple[int, int, bool]


async def whole_range(size: int) -> AsyncGenerator[Range, None]:
    """All of it, whatever it is."""
    yield 0, size, True


async def data_ranges(source: Layer, size: int, *, inherited: bool = False) -> AsyncGenerator[Range, None]:
    """Ranges with data, and the zeroes between them. `inherited`: see `differing_ranges`."""
    async with aclosing(walk(source, 0, size)) as entries:
        async for entry in entries:
            yield entry.start, entry.start + entry.length, entry.data and not (inherited and _is_own(entry))


async def differing_ranges(
    one: Layer, other: Layer, size: int, *, inherited: bool = False
) -> AsyncGenerator[Range, None]:
    """Ranges of `one` that may differ from `other`: all but zeroes in both, and the same bytes of the same file.

    `inherited`: without what `one` has itself, which stays whatever comes below it.
    """
    files, others = files_of(one), files_of(other)
    async with aclosing(pairs(one, other, size)) as found:
        async for start, end, entry, under in found:
            yield start, end, not ((inherited and _is_own(entry)) or is_same(entry, files, under, others))


async def pairs(
    one: Layer, other: Layer, size: int
) -> AsyncGenerator[tuple[int, int, MapEntry, MapEntry | None], None]:
    """The first `size` bytes in parts (start, end) for which both disks have one entry each; None: it is shorter."""
    rest = min(size, other.size)
    async with aclosing(walk(one, 0, size)) as entries, aclosing(walk(other, 0, rest)) as below:
        under = await anext(below, None)
        async for entry in entries:
            position, end = entry.start, entry.start + entry.length
            while position < end:
                while under is not None and under.start + under.length <= position:
                    under = await anext(below, None)
                stop = end if under is None else min(end, under.start + under.length)
                yield position, stop, entry, under
                position = stop


def _is_own(entry: MapEntry) -> bool:
    """Whether the top layer of the chain has this range itself."""
    return entry.depth == 0 and entry.present


def is_same(one: MapEntry, files: dict[str, FileId], other: MapEntry | None, others: dict[str, FileId]) -> bool:
    """Whether two entries are of the same bytes where they overlap, by where those are."""
    if not one.data or other is None or not other.data:
        return not one.data and (other is None or not other.data)
    if files[one.filename or ""] != others[other.filename or ""] or one.compressed != other.compressed:
        return False
    if one.offset is None or other.offset is None:
        return True
    return one.offset - one.start == other.offset - other.start


async def widened(ranges: AsyncGenerator[Range, None], block: int, size: int) -> AsyncGenerator[Range, None]:
    """The ranges to copy as whole blocks, merged, and what is between them, up to `size`."""
    start = end = 0  # what is to be copied, and not yielded yet
    async with aclosing(ranges):
        async for first, last, copy in ranges:
            if not copy:
                continue
            first, last = round_down(first, block), min(round_up(last, block), size)
            if start < end and (first > end or end - start >= _MOST):
                yield start, end, True
                start = end
            if first > end:
                yield end, first, False
                start = end = first
            end = max(end, last)
    if start < end:
        yield start, end, True
    if end < size:
        yield end, size, False


def files_of(top: Layer) -> dict[str, FileId]:
    """Which file each layer of a chain is, by its path."""
    return {layer.path: FileId.of(layer.storage.stat()) for layer in layers_of(top)}
