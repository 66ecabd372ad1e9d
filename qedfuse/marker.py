"""Marks what L2 entries refer to, a chunk of a table at a time, at C speed where the entries are regular.

`Marker.mark` knows three ways, because an interpreter that looks at every entry is ten times too slow for most images:

1. The chunk is one run of consecutive clusters (an image that was filled in order): one comparison of memory.
2. All entries are valid: tests and differences on the whole chunk as one long integer, a 64-bit field an entry; then
   run by run, or entry by entry where the order is random.
3. Something is wrong: entry by entry, with the position of each fault.

This is the step that an extension module could replace: chunk in, `Marks` out.
"""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress, pairwise

from qedfuse.clustermap import ClusterMap, set_bits
from qedfuse.geometry import ENTRY_SIZE, ZERO_CLUSTER
from qedfuse.scan import Bounds, unpack_entries

#: Runs of fewer entries than this, on average, are not worth handling as runs.
_SHORT_RUN = 8

_ENTRY = struct.Struct("<Q")


@dataclass
class Marks:
    """What one chunk of L2 entries holds.

    `allocated` counts entries that are neither 0 nor 1, `fragmented` those of them that do not follow the one before,
    `last` is the last of them. `invalid` (an impossible offset) and `again` (a cluster marked before) are positions in
    the chunk, in entries.
    """

    allocated: int
    fragmented: int
    last: int
    invalid: list[int] = field(default_factory=list)
    again: list[int] = field(default_factory=list)


class Marker:
    """Marks what L2 entries refer to."""

    def __init__(self, bounds: Bounds, used: ClusterMap) -> None:
        self.used = used
        self._bounds = bounds
        self._cluster_size = bounds.header.cluster_size
        self._bits = bounds.header.geometry.cluster_bits
        self._progression = _Progression(self._bits)

    def mark(self, chunk: bytearray, last: int = 0) -> Marks:
        """Mark a chunk of entries. `last`: the last allocated entry before it in its table, 0 if there is none."""
        start = (len(chunk) - len(chunk.lstrip(b"\0"))) // ENTRY_SIZE
        end = -(-len(chunk.rstrip(b"\0")) // ENTRY_SIZE)
        if start >= end:
            return Marks(0, 0, last)
        if end - start == len(chunk) // ENTRY_SIZE:
            return self._mark(chunk, last)
        marks = self._mark(chunk[start * ENTRY_SIZE : end * ENTRY_SIZE], last)
        marks.invalid = [start + position for position in marks.invalid]
        marks.again = [start + position for position in marks.again]
        return marks

    def _mark(self, chunk: bytearray, last: int) -> Marks:
        """Mark a chunk that neither begins nor ends with an unallocated entry."""
        size = self._cluster_size
        number = len(chunk) // ENTRY_SIZE
        first, final = _ENTRY.unpack_from(chunk)[0], _ENTRY.unpack_from(chunk, len(chunk) - ENTRY_SIZE)[0]
        regular = final - first == (number - 1) * size and self._bounds.holds(first, number * size)
        if regular and self._progression.equals(chunk, first):
            seen = self.used.mark(first >> self._bits, number)
            broken = last != 0 and first != last + size
            return Marks(number, int(broken), final, again=set_bits(seen))
        entries = unpack_entries(chunk)
        marks = self._mark_valid(entries, entries, last)  # if there is nothing unallocated in between, either
        if marks is not None:
            return marks
        values = array("Q", filter(None, entries))
        if ZERO_CLUSTER in values:
            values = array("Q", filter(ZERO_CLUSTER.__lt__, values))
        if not values:
            return Marks(0, 0, last)
        return self._mark_valid(entries, values, last) or self._mark_one_by_one(entries, last)

    def _mark_valid(self, entries: array[int], values: array[int], last: int) -> Marks | None:
        """Mark `values`, the allocated ones of `entries`. None, and nothing done, if any of them is invalid."""
        number = len(values)
        constants = _constants(number, self._bounds)
        packed = _pack(values)
        if packed & constants.misaligned:
            return None
        high = constants.high
        if (constants.above - packed) & (packed + constants.below) & high != high:
            return None
        breaks = (packed >> 64) ^ (packed + constants.step & (1 << 64 * (number - 1)) - 1)
        starts = list(compress(range(1, number), _unpack(breaks, number - 1)))
        again: list[int] = []
        if len(starts) * _SHORT_RUN < number:
            for start, end in pairwise((0, *starts, number)):
                seen = self.used.mark(values[start] >> self._bits, end - start)
                if seen:
                    again.extend(start + position for position in set_bits(seen))
        else:
            again = self.used.mark_each(_unpack(packed >> self._bits, number))
        if again and number < len(entries):
            where = [position for position, entry in enumerate(entries) if entry > ZERO_CLUSTER]
            again = [where[position] for position in again]
        broken = last != 0 and values[0] != last + self._cluster_size
        return Marks(number, len(starts) + broken, values[-1], again=again)

    def _mark_one_by_one(self, entries: array[int], last: int) -> Marks:
        marks = Marks(0, 0, last)
        for position, entry in enumerate(entries):
            if entry <= ZERO_CLUSTER:
                continue
            marks.allocated += 1
            if marks.last and entry != marks.last + self._cluster_size:
                marks.fragmented += 1
            marks.last = entry
            if not self._bounds.holds(entry, self._cluster_size):
                marks.invalid.append(position)
            elif self.used.mark(entry >> self._bits, 1):
                marks.again.append(position)
        return marks


class _Progression:
    """Compares a chunk with first, first + cluster_size, first + 2 * cluster_size, ... as fast as memory goes.

    Holds a window of such entries that starts at a multiple of its span. The span is 256 to some power bytes, so moving
    the window sets only whole bytes of its entries, all to one value.
    """

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._length_bits = 12 + (-(bits + 12) % 8)
        self._span_bits = bits + self._length_bits
        self._window = bytearray()
        self._base = 0

    def equals(self, chunk: bytearray, first: int) -> bool:
        done, number = 0, len(chunk) // ENTRY_SIZE
        while done < number:
            value = first + (done << self._bits)
            self._move(value >> self._span_bits)
            start = value >> self._bits & (1 << self._length_bits) - 1
            end = min(start + number - done, 1 << self._length_bits)
            part = chunk if end - start == number else chunk[done * 8 : (done + end - start) * 8]
            with memoryview(self._window) as window, window[start * 8 : end * 8] as expected:
                if part != expected:
                    return False
            done += end - start
        return True

    def _move(self, base: int) -> None:
        length = 1 << self._length_bits
        if not self._window:
            self._window += _pack_bytes(array("Q", range(0, 1 << self._span_bits, 1 << self._bits)))
        old, new = self._base.to_bytes(8, "little"), base.to_bytes(8, "little")
        for index in range(8 - self._span_bits // 8):
            if old[index] != new[index]:
                self._window[self._span_bits // 8 + index :: 8] = new[index : index + 1] * length
        self._base = base


@dataclass(frozen=True)
class _Constants:
    """Integers of one 64-bit field an entry, for tests of all entries of a chunk at once.

    `high` is the top bit of each field. An entry with a bit of `misaligned` is invalid; without, all sums and
    differences below stay inside their fields. A field of above - entries has its high bit if the entry lies before the
    file's end, of entries + below if it lies behind the header. `step` is the cluster size.
    """

    high: int
    misaligned: int
    above: int
    below: int
    step: int


@lru_cache(maxsize=4)
def _constants(number: int, bounds: Bounds) -> _Constants:
    def repeat(value: int) -> int:
        return int.from_bytes(value.to_bytes(8, "little") * number, "little")

    top, size = 1 << 63, bounds.header.cluster_size
    return _Constants(
        high=repeat(top),
        misaligned=repeat(top | size - 1),
        above=repeat(top + bounds.end - 1),
        below=repeat(top - bounds.header.header_bytes),
        step=repeat(size),
    )


def _pack_bytes(values: array[int]) -> bytes:
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()


def _pack(values: array[int]) -> int:
    return int.from_bytes(_pack_bytes(values), "little")


def _unpack(packed: int, number: int) -> array[int]:
    return unpack_entries(packed.to_bytes(number * ENTRY_SIZE, "little"))
