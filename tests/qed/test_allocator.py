"""The bookkeeping of free clusters, against plain sets."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedfuse.qed.allocator import Allocator, HostRun
from qedfuse.qed.geometry import Geometry
from qedfuse.sizes import HostOffset

C = 4096
GEOMETRY = Geometry(C, 2)

steps = st.lists(
    st.tuples(
        st.sampled_from(["allocate", "table", "take", "back", "lose", "commit"]), st.integers(1, 5), st.integers(0, 9)
    ),
    max_size=40,
)


def clusters(offset: int, size: int) -> set[int]:
    return set(range(offset // C, (offset + size) // C))


@settings(deadline=None)
@given(steps)
def test_every_cluster_is_in_one_place(steps: list[tuple[str, int, int]]) -> None:
    """Used, free, lost, or behind the end; what is handed out was free or fresh."""
    allocator = Allocator(GEOMETRY, 10 * C)
    used: list[HostRun] = []
    free, lost = set[int](), set[int]()

    def hand_out(offset: HostOffset, size: int, end: int) -> None:
        assert clusters(offset, size) <= free | set(range(end // C, allocator.end // C))
        free.difference_update(clusters(offset, size))
        used.append((offset, size))

    for name, number, which in steps:
        end = allocator.end
        if name == "allocate":
            offset, size = allocator.allocate(number)
            assert C <= size <= number * C
            hand_out(offset, size, end)
        elif name == "table":
            hand_out(allocator.allocate_table(), GEOMETRY.table_bytes, end)
        elif name == "take":
            start, stop = allocator.next_free(end + 5 * C)
            allocator.take(start, min(number * C, stop - start))
            hand_out(start, min(number * C, stop - start), end)
        elif name == "commit":
            allocator.put_free(allocator.take_lost())
            assert not allocator.has_lost
            free |= lost
            lost.clear()
        elif used:
            run = used.pop(which % len(used))
            if name == "back":
                allocator.take_back(*run)
                free |= clusters(*run)
            else:
                allocator.lose(*run)
                lost |= clusters(*run)
        free.intersection_update(range(allocator.end // C))
        runs = list(allocator._free)
        assert set[int]().union(*(clusters(*run) for run in runs)) == free
        assert all(start + size < following for (start, size), (following, _) in pairwise(runs))
        assert allocator.has_lost == bool(lost) and (allocator.free, allocator.lost) == (len(free) * C, len(lost) * C)
        assert set[int]().union(*(clusters(*run) for run in used)) | free | lost == set(range(10, allocator.end // C))


def test_what_was_not_used_is_handed_out_again() -> None:
    allocator = Allocator(GEOMETRY, 10 * C)
    first, second = allocator.allocate(2), allocator.allocate(3)
    assert (first, second, allocator.end) == ((10 * C, 2 * C), (12 * C, 3 * C), 15 * C)
    allocator.take_back(*first)
    assert allocator.end == 15 * C
    allocator.take_back(*second)
    assert allocator.end == 10 * C
    assert allocator.allocate(1) == (10 * C, C)
    assert not allocator.has_lost


def test_what_is_not_next_is_not_taken() -> None:
    allocator = Allocator(GEOMETRY, 10 * C)
    offset, size = allocator.allocate(4)
    allocator.take_back(offset, C)
    for bad in ((offset + C, C), (offset, 2 * C), (allocator.end, size)):
        with pytest.raises(AssertionError, match="not the next free"):
            allocator.take(*bad)
    allocator.take(offset, C)
    assert allocator.next_free(allocator.end) == (14 * C, 14 * C)
