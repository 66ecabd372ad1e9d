"""A map of the file's clusters: which of them something refers to."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator

from qedfuse.errors import CorruptError
from qedfuse.scan import Bounds
from qedfuse.storage import Storage

_BITS = [1 << bit for bit in range(8)]


class ClusterMap:
    """One bit for every cluster of the file, in parts of 8 MiB that exist once something in them is marked.

    The parts together may take 160 MiB, and more only as far as the file really holds that much data: a sparse file
    that scatters a few references over exabytes raises CorruptError instead of eating the memory.
    """

    _SHIFT = 26
    _CLUSTERS = 1 << _SHIFT
    _MAX_PARTS = 20

    def __init__(self, storage: Storage, bounds: Bounds) -> None:
        self.clusters = bounds.end // bounds.header.cluster_size
        self.marked = 0
        self._path = storage.path
        self._parts: dict[int, bytearray] = {}
        self._part_bytes = min(self._CLUSTERS, self.clusters) + 7 >> 3
        self._max_parts = self._MAX_PARTS + (
            storage.stat().st_blocks * 512 // bounds.header.cluster_size >> self._SHIFT
        )

    def _part(self, number: int) -> bytearray:
        part = self._parts.get(number)
        if part is None:
            if len(self._parts) >= self._max_parts:
                raise CorruptError(
                    self._path,
                    "the tables scatter too few clusters over too large a sparse file to check it in bounded memory",
                )
            part = self._parts[number] = bytearray(self._part_bytes)
        return part

    def mark(self, first: int, number: int) -> int:
        """Mark a run of clusters. Returns those marked before as bits: bit i stands for cluster first + i."""
        seen = done = 0
        while done < number:
            part = self._part(first + done >> self._SHIFT)
            start = first + done & self._CLUSTERS - 1
            length = min(number - done, self._CLUSTERS - start)
            low, high, shift = start >> 3, start + length + 7 >> 3, start & 7
            old = int.from_bytes(part[low:high], "little")
            new = (1 << length) - 1 << shift
            seen |= (old & new) >> shift << done
            part[low:high] = (old | new).to_bytes(high - low, "little")
            done += length
        self.marked += number - seen.bit_count()
        return seen

    def mark_each(self, clusters: array[int]) -> list[int]:
        """Mark clusters in any order. Returns the positions in `clusters` of those that were marked before."""
        if self.clusters > self._CLUSTERS:
            return [position for position, cluster in enumerate(clusters) if self.mark(cluster, 1)]
        part, bits = self._part(0), _BITS
        again = []
        for cluster in clusters:  # the one loop over every entry that is left where their order is random
            index = cluster >> 3
            old = part[index]
            new = old | bits[cluster & 7]
            if new == old:
                again.append(cluster)
            part[index] = new
        self.marked += len(clusters) - len(again)
        return _last_positions(clusters, again) if again else []

    def free_runs(self, start: int) -> Iterator[tuple[int, int]]:
        """The unmarked clusters from `start` on, as runs (first, end) in order, adjacent ones merged.

        Some runs are empty (first == end): they only give the caller an occasion to let other tasks run.
        """
        first = end = start
        for low, high in self._unmarked():
            low = max(low, start)
            if low >= high:
                yield end, end
            elif low == end:
                end = high
            else:
                yield first, end
                first, end = low, high
        yield first, end

    def _unmarked(self) -> Iterator[tuple[int, int]]:
        step = 1 << 15
        done = 0
        for number in sorted(self._parts):  # not every part of an exabyte
            part, base = self._parts[number], number << self._SHIFT
            yield done, base
            done = min(base + self._CLUSTERS, self.clusters)
            for low in range(base, done, step):
                high = min(low + step, done)
                bits = int.from_bytes(part[low - base >> 3 : high - base + 7 >> 3], "little")
                if not bits:
                    yield low, high
                elif bits == (1 << high - low) - 1:
                    yield low, low
                else:
                    for match in re.finditer("0+", f"{bits:0{high - low}b}"[::-1]):
                        yield low + match.start(), low + match.end()
        yield done, self.clusters

    def end_of_marked(self) -> int:
        """The cluster behind the last marked one."""
        for number in sorted(self._parts, reverse=True):
            content = self._parts[number].rstrip(b"\0")
            if content:
                return (number << self._SHIFT) + 8 * len(content) - 8 + content[-1].bit_length()
        return 0


def _last_positions(values: array[int], again: list[int]) -> list[int]:
    """For each value in `again`, a position in `values`, the last ones first taken; ascending."""
    left = Counter(again)
    positions = []
    for position in range(len(values) - 1, -1, -1):
        value = values[position]
        if left[value]:
            left[value] -= 1
            positions.append(position)
    return positions[::-1]


def set_bits(bits: int) -> list[int]:
    """The numbers of the bits that are 1, ascending."""
    return [match.start() for match in re.finditer("1", f"{bits:b}"[::-1])] if bits else []
