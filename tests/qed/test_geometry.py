"""geometry.py against the specification's own words, for every legal size and at the edges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.qed.geometry import Geometry
from qedfuse.sizes import MAX_OFFSET, is_power_of_two, round_down, round_up

CLUSTER_SIZES = [1 << bits for bits in range(12, 27)]
TABLE_SIZES = [1, 2, 4, 8, 16]
KIB, MIB, GIB, TIB = (1 << bits for bits in (10, 20, 30, 40))

geometries = st.builds(Geometry, st.sampled_from(CLUSTER_SIZES), st.sampled_from(TABLE_SIZES))


@pytest.mark.parametrize("table_size", TABLE_SIZES)
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_every_legal_size(cluster_size: int, table_size: int) -> None:
    geometry = Geometry(cluster_size, table_size)
    entries = table_size * cluster_size // 8
    assert 1 << geometry.cluster_bits == cluster_size
    assert geometry.table_bytes == table_size * cluster_size
    assert geometry.table_entries == entries
    assert geometry.table_pages * 512 == entries
    assert 1 << geometry.table_page_bits == geometry.table_pages
    assert geometry.l2_coverage == entries * cluster_size
    assert geometry.max_image_size == min(entries * entries * cluster_size, MAX_OFFSET)
    assert geometry.max_image_size % 512 == 0
    assert geometry.max_image_size < 1 << 63


@pytest.mark.parametrize(
    ("cluster_size", "table_size", "max_size"),
    [(4 * KIB, 1, GIB), (4 * KIB, 16, 256 * GIB), (64 * KIB, 4, 64 * TIB), (2 * MIB, 4, 1 << 61)],
)
def test_known_maximum_sizes(cluster_size: int, table_size: int, max_size: int) -> None:
    assert Geometry(cluster_size, table_size).max_image_size == max_size


def test_default_is_qemus() -> None:
    assert Geometry() == Geometry(64 * KIB, 4)


@pytest.mark.parametrize("size", [-4096, 0, 1, 2048, 4095, 4097, 12288, 64 * MIB + 4096, 128 * MIB, 1 << 31])
def test_illegal_cluster_size_at_the_edges(size: int) -> None:
    with pytest.raises(ValueError, match=rf"cluster size {size} is not"):
        Geometry(size, 4)


@pytest.mark.parametrize("size", [-4, 0, 3, 5, 15, 17, 32, 1 << 31])
def test_illegal_table_size_at_the_edges(size: int) -> None:
    with pytest.raises(ValueError, match=rf"table size {size} is not"):
        Geometry(64 * KIB, size)


@given(st.integers(-(1 << 32), 1 << 32), st.integers(-(1 << 32), 1 << 32))
def test_any_other_size_is_refused(cluster_size: int, table_size: int) -> None:
    if cluster_size in CLUSTER_SIZES and table_size in TABLE_SIZES:
        Geometry(cluster_size, table_size)
    else:
        with pytest.raises(ValueError, match="is not a power of two between"):
            Geometry(cluster_size, table_size)


@given(geometries, st.data())
def test_a_cluster_starts_at_or_before_its_offsets(geometry: Geometry, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, geometry.max_image_size - 1))
    start = geometry.start_of_cluster(offset)
    assert start % geometry.cluster_size == 0
    assert 0 <= offset - start < geometry.cluster_size


@given(geometries, st.data())
def test_counts_are_the_least_that_suffice(geometry: Geometry, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, geometry.max_image_size))
    clusters = geometry.clusters_for(size)
    assert clusters * geometry.cluster_size >= size > (clusters - 1) * geometry.cluster_size
    assert clusters <= geometry.table_entries**2


@given(st.integers(0, 1 << 64), st.integers(1, 1 << 40))
def test_rounding(value: int, unit: int) -> None:
    up, down = round_up(value, unit), round_down(value, unit)
    assert up % unit == down % unit == 0
    assert down <= value <= up
    assert up - down in (0, unit)
    assert (up == down) == (value % unit == 0)


def test_powers_of_two() -> None:
    powers = {1 << bits for bits in range(10)}
    assert {value for value in range(-5, 1000) if is_power_of_two(value)} == powers
