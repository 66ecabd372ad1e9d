"""One corpus of tables, in memory, through all that decides what an entry means: `Tables.map_prefix`, which is the
reference, the short way of `Image.read_nowait`, and `layer_run` and `layer_missing` of the fast path, which are in C.

Each must agree with `meaning`, which is the format's rule in a few words.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from qedfuse.errors import CorruptError
from qedfuse.layers.runs import Kind, Run, append_run
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.image import Image
from qedfuse.qed.native_view import NativeView
from qedfuse.sizes import PAGE_ENTRIES, PAGE_SIZE, GuestOffset, HostOffset, TableIndex, round_down, round_up
from tests.helpers.doubles.ram import RamFile, RamStorage
from tests.helpers.images.images import POOL, new_chain, read_header

native = pytest.importorskip("qedfuse.native._fastpath")

#: What the file has behind its header and the L1 table: so many clusters, and a part of one.
CLUSTERS = 40
ENDS = [0, 512, -512, -100]
GEOMETRIES = [Geometry(4096, 1), Geometry(4096, 2), Geometry(65536, 4)]


@dataclass
class Case:
    """An image, open for reading, whose pages in memory are written to at will, and what C sees of it."""

    image: Image
    view: NativeView
    seen: Any  # _fastpath.Layer
    file: RamFile

    @property
    def cluster(self) -> int:
        return self.image.geometry.cluster_size

    def meaning(self, entry: int, size: int) -> Kind | None:
        """Of an entry for `size` bytes of the file. None: it is corrupt."""
        if entry <= 1:
            return Kind(entry)
        aligned = entry % self.cluster == 0
        return Kind.DATA if aligned and self.view.data_start <= entry <= self.view.file_end - size else None

    def entries(self) -> list[int]:
        """Those at every limit, and hostile ones."""
        cluster, start, end = self.cluster, self.view.data_start, self.view.file_end
        limits = [start, round_down(end, cluster), round_up(end, cluster), end, 1 << 32, 1 << 63, (1 << 64) - cluster]
        near = [limit + step for limit in limits for step in (-cluster, -512, -1, 0, 1, 512, cluster)]
        table = self.image.geometry.table_bytes
        near += [round_down(end, cluster) - table, round_up(end, cluster) - table, (1 << 64) - 1]
        return sorted({0, 1, 2, 511, 512, *(entry for entry in near if 0 <= entry < 1 << 64)})

    def map_prefix(self, offset: int, size: int) -> list[Run] | None:
        try:
            return self.image.tables.map_prefix(GuestOffset(offset), size)
        except CorruptError:
            return None


async def make_case(geometry: Geometry, end: int) -> Case:
    cluster = geometry.cluster_size
    chain = await new_chain(4 * max(PAGE_ENTRIES, geometry.table_entries) * cluster, geometry)
    file = chain.file
    first = round_up(file.size, cluster)
    for host in range(first, first + CLUSTERS * cluster, cluster):
        file.write(host, bytes([1 + host // cluster % 255]) * cluster)
    file.truncate(first + CLUSTERS * cluster + end)
    image = Image(RamStorage("image", file, writable=False), read_header(file), None, writable=False, pool=POOL)
    view = NativeView(image)
    seen = native.Layer(3, image.size, view=view)
    view.watch(seen.l1, seen.l2)
    image.tables.l1.insert(0, image.header.l1_table_offset, None)
    return Case(image, view, seen, file)


def run_on(geometry: Geometry, end: int, check: Callable[[Case], Awaitable[None]]) -> None:
    async def main() -> None:
        case = await make_case(geometry, end)
        try:
            await check(case)
        finally:
            await case.image.close()

    trio.run(main)


on_all = pytest.mark.parametrize(("geometry", "end"), list(itertools.product(GEOMETRIES, ENDS)), ids=str)


def pairs(case: Case, page: memoryview) -> Iterator[tuple[int, int, int]]:
    """Sets neighbouring entries, in turn at the start, in the middle and at the end of a page that is zeroes else."""
    for number, (entry, following) in enumerate(itertools.product(case.entries(), repeat=2)):
        place = (0, 200, PAGE_ENTRIES - 2)[number % 3]
        page[place], page[place + 1] = entry, following
        yield place, entry, following
        page[place] = page[place + 1] = 0


@on_all
def test_entries_of_l2_tables(geometry: Geometry, end: int) -> None:
    async def check(case: Case) -> None:
        cluster = case.cluster
        page = case.image.tables.l2.insert(0, case.view.data_start, None)
        kinds = set()
        for place, *entries in pairs(case, page):
            offset = place * cluster
            expected: list[Run] | None = []
            for number, entry in enumerate(entries):
                kind = case.meaning(entry, cluster)
                kinds.add(kind)
                host = entry if kind is Kind.DATA else 0
                check_cluster(case, offset + number * cluster, kind, host)
                if kind is None or expected is None:
                    expected = None
                else:
                    append_run(expected, kind, cluster, HostOffset(host))
            check_range(case, offset, entries, expected)
        assert kinds == {Kind.UNALLOCATED, Kind.ZERO, Kind.DATA, None}

    run_on(geometry, end, check)


def check_cluster(case: Case, offset: int, kind: Kind | None, host: int) -> None:
    """Of the whole cluster, and of parts of it."""
    cluster = case.cluster
    for skip, size in ((0, cluster), (512, 512), (cluster - 1, 1)):
        place = host + skip if kind is Kind.DATA else 0
        assert case.map_prefix(offset + skip, size) == (None if kind is None else [Run(kind, size, HostOffset(place))])
        assert case.seen.run(offset + skip, size)[0] == (native.UNKNOWN if kind is None else kind)
        if kind is None:
            with pytest.raises(CorruptError):
                case.image.read_nowait(offset + skip, size)
            continue
        assert case.seen.run(offset + skip, size) == (kind, size, place)
        data = case.image.read_nowait(offset + skip, size)
        if data is None:  # no bytes of a sector at the end of the file: the short way leaves it to the other one
            assert kind is Kind.DATA and place + size > case.image.storage.size()
        else:
            assert data == (case.file.read(place, size) if kind is Kind.DATA else bytes(size))


def check_range(case: Case, offset: int, entries: list[int], expected: list[Run] | None) -> None:
    """C goes no further than to the end of the first run; a run that is corrupt somewhere it leaves to Python."""
    size = len(entries) * case.cluster
    assert case.map_prefix(offset, size) == expected
    kind, length, host = case.seen.run(offset, size)
    if expected is not None:
        assert (kind, length, host) == expected[0]
    elif kind == native.UNKNOWN:
        first = case.meaning(entries[0], case.cluster)
        assert first is None or (first is Kind.DATA and entries[1] == entries[0] + case.cluster)
    else:
        assert length == case.cluster
        assert kind == case.meaning(entries[0], case.cluster)


@on_all
def test_long_runs(geometry: Geometry, end: int) -> None:
    """A page that is one run, and those that almost are."""

    async def check(case: Case) -> None:
        cluster = case.cluster
        page = case.image.tables.l2.insert(0, case.view.data_start, None)
        whole = PAGE_ENTRIES * cluster
        for entry in case.entries():
            step = cluster if entry > 1 else 0
            for count in (CLUSTERS - 1, CLUSTERS, CLUSTERS + 1, PAGE_ENTRIES):
                for number in range(PAGE_ENTRIES):
                    page[number] = (entry + number * step) % (1 << 64) if number < count else 1
                kind = case.meaning(entry, count * step)
                runs, run = case.map_prefix(0, whole), case.seen.run(0, whole)
                if kind is None:
                    assert runs is None
                    assert run[0] == native.UNKNOWN
                else:
                    assert runs is not None
                    assert run == runs[0]
                    assert run[1] == (whole if kind is Kind.ZERO else count * cluster)

    run_on(geometry, end, check)


@on_all
def test_entries_of_l1_tables(geometry: Geometry, end: int) -> None:
    """Of tables whose pages are not in memory."""

    async def check(case: Case) -> None:
        tables, table_bytes = case.image.tables, geometry.table_bytes
        l1 = tables.l1.pages[0]
        coverage = geometry.l2_coverage
        kinds = set()
        for index, entry in itertools.product((0, 1, 2), case.entries()):
            l1[index] = entry
            kind = case.meaning(entry, table_bytes) if entry != 1 else None  # a table cannot be zeroes
            kinds.add(kind)
            for offset in (index * coverage, index * coverage + coverage - case.cluster):
                runs, run = case.map_prefix(offset, case.cluster), case.seen.run(offset, case.cluster)
                if kind is Kind.UNALLOCATED:
                    assert runs == [run] == [(Kind.UNALLOCATED, case.cluster, 0)]
                    continue
                assert run[0] == native.ABSENT
                missing = case.seen.missing(offset)
                if kind is None:
                    assert runs is None
                    assert missing is None
                else:
                    assert runs == []
                    page = offset // case.cluster // PAGE_ENTRIES
                    assert missing == (False, page, entry + page * PAGE_SIZE % table_bytes)
                    assert await tables.table(TableIndex(index)) == entry
            l1[index] = 0
        assert kinds == {Kind.UNALLOCATED, Kind.DATA, None}

    run_on(geometry, end, check)


@on_all
def test_pages_that_are_not_in_memory(geometry: Geometry, end: int) -> None:
    async def check(case: Case) -> None:
        case.image.tables.l1.drop(0)
        assert case.map_prefix(0, case.cluster) == []
        assert case.seen.run(0, case.cluster)[0] == native.ABSENT
        assert case.seen.missing(0) == (True, 0, case.image.header.l1_table_offset)

    run_on(geometry, end, check)
