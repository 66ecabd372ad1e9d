"""Marking chunks of L2 entries: the fast ways find exactly what looking at every entry finds."""

from __future__ import annotations

import os
import random
import stat
from array import array
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qedfuse.clustermap import ClusterMap, set_bits
from qedfuse.errors import CorruptError
from qedfuse.header import Header
from qedfuse.marker import Marker, Marks
from qedfuse.scan import Bounds
from tests.helpers.check_images import Ram


@dataclass
class Size:
    """A storage that is nothing but large."""

    size: int

    def storage(self) -> Ram:
        ram = Ram(b"")
        fields = (stat.S_IFREG | 0o600, 1, 1, 1, 0, 0, self.size, 0, 0, 0)
        ram.stat = lambda: os.stat_result(fields, {"st_blocks": 0})  # type: ignore[method-assign]
        return ram


def bounds_of(bits: int, clusters: int) -> Bounds:
    return Bounds.of(Header(1 << bits, 4, 1, 0, 0, 0, 1 << bits, 0), clusters << bits)


def plain(bounds: Bounds, entries: array[int], last: int, used: set[int]) -> Marks:
    size = bounds.header.cluster_size
    marks = Marks(0, 0, last)
    for position, entry in enumerate(entries):
        if entry < 2:
            continue
        marks.allocated += 1
        marks.fragmented += marks.last != 0 and entry != marks.last + size
        marks.last = entry
        if entry % size or not size <= entry <= bounds.end - size:
            marks.invalid.append(position)
        elif entry in used:
            marks.again.append(position)
        used.add(entry)
    return marks


def entries_from(rng: random.Random, number: int, bits: int, clusters: int) -> array[int]:
    """Runs, in order or not, zeroes, zero clusters, doubles and impossible values."""
    values = array("Q")
    length = rng.choice((1, 3, 50, number))
    while len(values) < number:
        kind = rng.randrange(20)
        start = rng.randrange(1, clusters)
        if kind < 12:
            run = range(start, min(start + rng.randint(1, length), clusters))
            values.extend(cluster << bits for cluster in run)
        elif kind < 15:
            values.extend([0] * rng.randint(1, length))
        elif kind < 17:
            values.extend([1] * rng.randint(1, 3))
        elif kind == 17 and values and length == 3:
            values.append(rng.choice(values))
        elif kind == 18 and not rng.randrange(8):
            values.append(rng.choice((2, 3 << bits | 512, clusters << bits, (1 << 63) | 1 << bits, (1 << 64) - 1)))
    return values[:number]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([12, 13, 16, 21, 26]), st.sampled_from([1 << 14, 1 << 20, 1 << 28]))
@example(0, 12, 1 << 14)
def test_marks_are_those_of_a_plain_loop(seed: int, bits: int, clusters: int) -> None:
    rng = random.Random(seed)
    bounds = bounds_of(bits, clusters)
    used = ClusterMap(Size(bounds.end).storage(), bounds)
    marker, expected_used, last = Marker(bounds, used), set[int](), 0
    for _ in range(3):
        entries = entries_from(rng, rng.choice((512, 1024, 4096)), bits, clusters)
        marks = marker.mark(bytearray(entries.tobytes()), last)
        expected = plain(bounds, entries, last, expected_used)
        expected.again.sort()
        assert sorted(marks.again) == expected.again
        marks.again = expected.again
        assert marks == expected
        last = marks.last
    valid = {entry >> bits for entry in expected_used if not entry % (1 << bits) and (1 << bits) <= entry < bounds.end}
    assert used.marked == len(valid)
    free = [run for run in used.free_runs(1) if run[0] < run[1]]
    assert all(end < start for (_, end), (start, _) in pairwise(free))
    assert sum(end - start for start, end in free) == clusters - 1 - len(valid)
    assert not any(start <= cluster < end for start, end in free[:50] for cluster in valid)
    assert used.end_of_marked() == max(valid, default=-1) + 1


@pytest.mark.parametrize("bits", [12, 13, 16, 21, 26])
@pytest.mark.parametrize("number", [512, 32768])
def test_one_run_across_every_boundary(bits: int, number: int) -> None:
    """Runs that begin anywhere, over the ends of the comparison's window and of the map's parts."""
    clusters = 1 << 28
    bounds = bounds_of(bits, clusters)
    for edge in (1 << 12, 1 << 16, 1 << 19, 1 << 26, clusters - number - 5):
        used = ClusterMap(Size(bounds.end).storage(), bounds)
        marker = Marker(bounds, used)
        first = edge - number // 2 + 3 if edge > number else edge
        entries = array("Q", range(first << bits, first + number << bits, 1 << bits))
        assert marker.mark(bytearray(entries.tobytes())) == Marks(number, 0, entries[-1])
        assert used.marked == number
        entries[number // 3] = entries[-1]
        marks = marker.mark(bytearray(entries.tobytes()), last=5 << bits)
        assert (marks.fragmented, len(marks.again)) == (3, number)
        assert used.marked == number


def test_the_last_reference_is_the_second_one() -> None:
    bounds = bounds_of(16, 1 << 20)
    marker = Marker(bounds, ClusterMap(Size(bounds.end).storage(), bounds))
    clusters = list(range(10, 2058, 2))
    random.Random(1).shuffle(clusters)
    clusters[700] = clusters[100]
    clusters[900] = clusters[100]
    marks = marker.mark(bytearray(array("Q", (cluster << 16 for cluster in clusters)).tobytes()))
    assert marks.again == [700, 900]


def test_memory_is_bounded() -> None:
    bounds = bounds_of(12, 1 << 50)
    used = ClusterMap(Size(bounds.end).storage(), bounds)
    for number in range(ClusterMap._MAX_PARTS):
        used.mark(1 + number * (1 << 40), 1)
    with pytest.raises(CorruptError, match="bounded memory"):
        used.mark(1 << 49, 1)


def test_set_bits() -> None:
    assert set_bits(0) == []
    assert set_bits(1 << 70 | 0b1010) == [1, 3, 70]
