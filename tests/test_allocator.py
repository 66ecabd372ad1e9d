"""The bookkeeping of free clusters, against plain sets."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qedfuse.allocator import Allocator, Runs
from qedfuse.geometry import Geometry

C = 4096
GEOMETRY = Geometry(C, 2)

operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 30), st.integers(1, 8)),
        st.tuples(st.just("take_first"), st.integers(1, 5), st.integers(0, 1)),
        st.tuples(st.just("take_last"), st.integers(0, 40), st.just(0)),
    ),
    max_size=30,
)


def clusters(start: int, size: int) -> set[int]:
    return set(range(start, start + size))


@given(operations)
def test_runs_are_a_set(steps: list[tuple[str, int, int]]) -> None:
    """Also of what is added twice, as the clusters of a corrupt image are."""
    runs, model = Runs(), set[int]()
    for name, first, second in steps:
        if name == "add":
            runs.add(first, second)
            model |= clusters(first, second)
        elif name == "take_first":
            taken = runs.take_first(first, whole=bool(second))
            if taken is None:
                assert not model or second
            else:
                assert clusters(*taken) <= model and taken[1] <= first
                assert taken[1] == first or not second
                model -= clusters(*taken)
        else:
            end = runs.take_last(first)
            assert end <= first and clusters(end, first - end) <= model
            assert end == first or end - 1 not in model
            model -= clusters(end, first - end)
        found = list(runs)
        assert set().union(*(clusters(*run) for run in found)) == model
        assert all(end + size < start for (end, size), (start, _) in pairwise(found))
        assert runs.total == len(model) and bool(runs) == bool(model)


def test_what_was_not_used_is_handed_out_again() -> None:
    allocator = Allocator(GEOMETRY, 10 * C)
    first, second = allocator.allocate(2), allocator.allocate(3)
    assert (first, second, allocator.end) == ((10 * C, 2 * C), (12 * C, 3 * C), 15 * C)
    allocator.take_back(*first)
    assert allocator.end == 15 * C
    allocator.take_back(*second)
    assert allocator.end == 10 * C
    assert allocator.allocate(1) == (10 * C, C)
    assert not allocator.recycling
