"""The map of clusters: what marking chunks of L2 entries finds is what looking at one entry after the other finds."""

from __future__ import annotations

import os
import random
import stat
import struct
from array import array
from bisect import bisect_left
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qedfuse.errors import CorruptError
from qedfuse.native._clustermap import Bitmap
from qedfuse.qed.cluster_map import ClusterMap, Marks
from qedfuse.qed.header import Header
from qedfuse.qed.table_walk import Bounds
from tests.helpers.doubles.image_ram import Ram

PART = 1 << 26


def bounds_of(bits: int, clusters: int, header_size: int = 1) -> Bounds:
    return Bounds.of(Header(1 << bits, 4, header_size, 0, 0, 0, header_size << bits, 0), clusters << bits)


def map_of(bounds: Bounds, *, holes: bool = True) -> ClusterMap:
    """For a file that is nothing but large, and all a hole or full of data."""
    ram = Ram(b"")
    fields = (stat.S_IFREG | 0o600, 1, 1, 1, 0, 0, bounds.end, 0, 0, 0)
    blocks = 0 if holes else bounds.end // 512
    ram.stat = lambda: os.stat_result(fields, {"st_blocks": blocks})  # type: ignore[method-assign]
    return ClusterMap(ram, bounds)


def plain(bounds: Bounds, chunk: bytes, last: int, used: set[int]) -> Marks:
    """The reference."""
    size = bounds.header.cluster_size
    allocated = fragmented = 0
    invalid, again = [], []
    for position, (entry,) in enumerate(struct.iter_unpack("<Q", chunk)):
        if entry < 2:
            continue
        allocated += 1
        fragmented += last != 0 and entry != last + size
        last = entry
        if entry % size or not bounds.header.header_bytes <= entry <= bounds.end - size:
            invalid.append(position)
        elif entry in used:
            again.append(position)
        else:
            used.add(entry)
    return Marks(allocated, fragmented, last, invalid, again)


def runs(used: ClusterMap, start: int, *, marked: bool) -> list[tuple[int, int]]:
    """The runs of marked, or of free, clusters from `start` on."""
    found = []
    to, past = (used.next_marked, used.next_free) if marked else (used.next_free, used.next_marked)
    while (first := to(start)) < used.clusters:
        start = past(first)
        found.append((first, start))
    return found


def expect_map(used: ClusterMap, expected: set[int]) -> None:
    """Every question to the map is answered as the set of its marked clusters says."""
    ends = sorted(expected)
    assert used.marked == len(ends)
    assert used.end_of_marked() == (ends[-1] + 1 if ends else 0)
    found = runs(used, 0, marked=True)
    assert sum(end - first for first, end in found) == len(ends)
    assert all(cluster in expected for first, end in found for cluster in range(first, end))
    free = runs(used, 0, marked=False)
    edges = sorted([*found, *free])
    assert edges[0][0] == 0 and edges[-1][1] == used.clusters
    assert all(end == start for (_, end), (start, _) in pairwise(edges))
    expect_map_from_the_end(used, found, free)
    some = [edge for run in edges[:: len(edges) // 20 + 1] for edge in run]
    near = sorted({min(max(0, edge + step), used.clusters + 1) for edge in some for step in (-1, 0, 1)})
    for cluster in (*near, *(end + 1 for end in ends[:: len(ends) // 20 + 1]), used.clusters, (1 << 64) - 1):
        assert used.marked_below(cluster) == bisect_left(ends, cluster)


def expect_map_from_the_end(used: ClusterMap, found: list[tuple[int, int]], free: list[tuple[int, int]]) -> None:
    for forward, to, past in (
        (found, used.end_of_marked, used.end_of_free),
        (free, used.end_of_free, used.end_of_marked),
    ):
        backward, stop = [], used.clusters
        while stop := to(stop):
            backward.append((past(stop), stop))
            assert to(backward[-1][0] + 1) == backward[-1][0] + 1  # from inside of a run, too
            stop = backward[-1][0]
        assert backward[::-1] == forward
    assert used.end_of_marked() == used.end_of_marked((1 << 64) - 1) == used.end_of_marked(used.clusters)


def expect_entries(used: ClusterMap, expected: set[int], chunk: bytes, size: int) -> None:
    """`expected`: offsets of the marked clusters."""
    entries = [entry for (entry,) in struct.iter_unpack("<Q", chunk)]
    positions = [position for position, entry in enumerate(entries) if entry > 1 and entry in expected]
    assert used.find_entries(bytearray(chunk)) == positions
    assert all(entry % size == 0 for entry in expected)


def entries_from(rng: random.Random, number: int, bits: int, clusters: int) -> array[int]:
    """Runs, in order or not, zeroes, zero clusters, doubles and impossible values."""
    values = array("Q")
    length = rng.choice((1, 3, 50, number))
    near = rng.choice((1, clusters - 1, clusters // 2 // PART * PART + 5))
    while len(values) < number:
        kind = rng.randrange(20)
        start = rng.choice((rng.randrange(clusters), max(0, near - rng.randrange(200))))
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
            wild = (2, 3 << bits | 512, clusters << bits, (1 << 63) | 1 << bits, (1 << 64) - 1, (1 << 64) - (1 << bits))
            values.append(rng.choice((*wild, rng.randrange(1 << 64))))
    return values[:number]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 1 << 32),
    st.sampled_from([12, 13, 16, 21, 26]),
    st.sampled_from([3, 1 << 14, 1 << 20, (1 << 28) + 7]),
)
@example(0, 12, 1 << 14)
def test_marks_are_those_of_a_plain_loop(seed: int, bits: int, clusters: int) -> None:
    rng = random.Random(seed)
    bounds = bounds_of(bits, clusters, rng.choice((1, 2)))
    used, expected, last = map_of(bounds), set[int](), 0
    for _ in range(3):
        chunk = entries_from(rng, rng.choice((512, 1024, 4096)), bits, clusters).tobytes()
        marks = plain(bounds, chunk, last, expected)
        other = entries_from(rng, 600, bits, clusters).tobytes()
        assert used.mark_entries(bytearray(chunk), last) == marks
        last = marks.last
        expect_entries(used, expected, chunk, 1 << bits)
        expect_entries(used, expected, other, 1 << bits)
    expect_map(used, {entry >> bits for entry in expected})


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.integers(0, (1 << 64) - 1), st.sampled_from([12, 21]), st.integers(1, 1 << 42))
@example(b"\0\0\0\0\0\0\0\x80" * 3, 0, 12, 1 << 42)
@example(b"\0" * 7 + b"\1\0\0", 1, 12, 1 << 42)
def test_any_bytes_at_all(chunk: bytes, last: int, bits: int, clusters: int) -> None:
    bounds, expected = bounds_of(bits, clusters), set[int]()
    used = map_of(bounds)
    whole = chunk[: len(chunk) // 8 * 8]
    assert used.find_entries(chunk) == []
    assert used.mark_entries(chunk, last) == plain(bounds, whole, last, expected)
    assert used.marked == len(expected)
    expect_entries(used, expected, whole, 1 << bits)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 130)), max_size=30), st.integers(1, 700))
def test_runs_are_marked_as_one_by_one(spans: list[tuple[int, int]], clusters: int) -> None:
    """In a map whose size is no multiple of anything; around the end of a part, too."""
    for base in (0, PART - 300):
        used, expected = map_of(bounds_of(16, base + clusters)), set[int]()
        for start, number in spans:
            first = base + min(start, clusters)
            number = min(number, base + clusters - first)
            span = set(range(first, first + number))
            assert used.mark(first, number) == len(span & expected)
            expected |= span
        expect_map(used, expected)


@pytest.mark.parametrize("bits", [12, 16, 26])
def test_one_run_across_every_boundary(bits: int) -> None:
    clusters, number = 1 << 28, 32768
    bounds = bounds_of(bits, clusters)
    for edge in (1 << 16, PART, 3 * PART, clusters - number // 2 - 3):
        used = map_of(bounds)
        first = edge - number // 2 + 3
        entries = array("Q", range(first << bits, first + number << bits, 1 << bits))
        assert used.mark_entries(entries.tobytes()) == Marks(number, 0, entries[-1], [], [])
        assert used.marked == number
        assert runs(used, 0, marked=True) == [(first, first + number)]
        entries[number // 3] = entries[-1]
        marks = used.mark_entries(entries.tobytes(), 5 << bits)
        assert (marks.fragmented, marks.again) == (3, list(range(number)))
        assert used.marked == number


def test_many_parts_in_turn() -> None:
    """More parts than a loop remembers, met in every order."""
    clusters = 40 * PART
    used = map_of(bounds_of(12, clusters), holes=False)
    numbers = [number * PART + 9 for number in range(40)] * 3
    random.Random(1).shuffle(numbers)
    marks = used.mark_entries(array("Q", (number << 12 for number in numbers)).tobytes())
    assert (marks.allocated, len(marks.again)) == (120, 80)
    expect_map(used, set(numbers))


def test_the_last_reference_is_the_second_one() -> None:
    used = map_of(bounds_of(16, 1 << 20))
    clusters = list(range(10, 2058, 2))
    random.Random(1).shuffle(clusters)
    clusters[700] = clusters[100]
    clusters[900] = clusters[100]
    marks = used.mark_entries(array("Q", (cluster << 16 for cluster in clusters)).tobytes())
    assert marks.again == [700, 900]


def test_memory_is_bounded() -> None:
    used = map_of(bounds_of(12, 1 << 50))
    for number in range(ClusterMap._MAX_PARTS):
        used.mark(1 + number * (1 << 40), 1)
    with pytest.raises(CorruptError, match="bounded memory"):
        used.mark(1 << 49, 1)
    with pytest.raises(CorruptError, match="bounded memory"):
        used.mark_entries(struct.pack("<QQ", 1 << 12, 1 << 61))
    assert used.marked == ClusterMap._MAX_PARTS  # cluster 1 again
    assert used.end_of_marked() == 2 + (ClusterMap._MAX_PARTS - 1) * (1 << 40)


def test_what_is_not_in_the_map_is_refused() -> None:
    used = Bitmap(100, 1, 12, 1)
    for first, number in ((100, 1), (99, 2), (0, 101), (101, 0), (-1, 1), (1, -1), (1 << 63, 1 << 63)):
        with pytest.raises(ValueError, match="not in the map"):
            used.mark(first, number)
    assert used.mark(100, 0) == used.mark(0, 0) == used.marked == 0
    assert (used.next_free(99), used.next_free(100), used.next_free(1 << 63)) == (99, 100, 100)
    assert (used.next_marked(0), used.next_marked(100), used.next_marked((1 << 64) - 1)) == (100, 100, 100)
    for clusters, bits in ((1 << 53, 12), (1, 64)):
        with pytest.raises(ValueError, match="not a file's clusters"):
            Bitmap(clusters, 1, bits, 1)
    for call in (used.mark_entries, used.find_entries):
        with pytest.raises(TypeError):
            call("text")  # type: ignore[arg-type]
    nothing = Bitmap(0, 0, 12, 1)
    assert nothing.mark_entries(struct.pack("<QQ", 0, 4096)) == (1, 0, 4096, [1], [])
    assert nothing.next_free(0) == nothing.next_marked(0) == nothing.end_of_marked() == 0
    assert nothing.end_of_free() == nothing.marked_below(5) == 0
    assert nothing.find_entries(struct.pack("<QQ", 0, 4096)) == []
