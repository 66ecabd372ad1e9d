"""Finding the host's holes costs little, however many there are: in clusters and in tables, one by one or together."""

from __future__ import annotations

import errno
import os
import random
import time
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qedfuse.chain.opening import open_image
from qedfuse.fuse.fallocate import fallocate
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.remote_file import RemoteFile
from qedfuse.host.storage import HostExtent
from qedfuse.layers.extents import HostExtents
from qedfuse.layers.mapping import walk
from qedfuse.layers.seek import find_segments
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import Header
from qedfuse.sizes import PAGE_ENTRIES
from tests.bench.measures import mapped_terabyte
from tests.bench.targets import QedFuse
from tests.helpers.doubles.ram import PAGE, RamFile, RamStorage
from tests.helpers.images.chains import run
from tests.helpers.images.devices import device_with
from tests.helpers.images.host_holes import (
    CLUSTER,
    KIB,
    MIB,
    Segments,
    full_image,
    held,
    our_map,
    punch_guest,
)
from tests.helpers.images.hostile import words
from tests.helpers.judges.breathing import breathing
from tests.helpers.judges.pace import counting
from tests.helpers.judges.seeking import next_data, next_hole
from tests.helpers.mounts.guests import filesystem, need_guest
from tests.helpers.qemu.cli import qedfuse

TIB = 1 << 40


# -- what it costs ----------------------------------------------------------------------------------------------------


class Counting(RamStorage):
    """Counts the calls that ask the host, and those that go to a thread on a real one."""

    calls = 0
    trips = 0

    def next_data(self, offset: int) -> int | None:
        self.calls += 1
        return super().next_data(offset)

    def next_hole(self, offset: int) -> int:
        self.calls += 1
        return super().next_hole(offset)

    async def find_extents(self, ranges: Any, most: int) -> list[HostExtent]:
        self.trips += 1
        return await super().find_extents(ranges, most)


def ram(pages: int, holes: set[int]) -> Counting:
    file = RamFile()
    file.truncate(pages * PAGE)
    for page in set(range(pages)) - holes:
        file.write(page * PAGE, b"x" * PAGE)
    return Counting("ram", file, writable=False)


async def ask_all(extents: HostExtents, ranges: Segments) -> set[int]:
    """The pages of data in ranges, which are asked for in their order."""
    found: set[int] = set()
    for number, (start, end) in enumerate(ranges):
        while start < end:
            known = extents.known(start, end)
            if not known:
                rest = [(start, end), *ranges[number + 1 : number + extents.ahead]]
                await extents.learn(rest)
                known = extents.known(start, end)
                assert known
            for part in known:
                assert part.start == start < part.end <= end
                start = part.end
                if part.is_data:
                    found.update(range(part.start // PAGE, part.end // PAGE))
    return found


@pytest.mark.parametrize(
    ("holes", "calls"),
    [(set(), 30), (set(range(1000)), 30), (set(range(300, 600)), 40), (set(range(0, 1000, 2)), 4000)],
    ids=["data", "hole", "data, hole, data", "every second page"],
)
def test_a_fragmented_table_takes_few_calls(holes: set[int], calls: int) -> None:
    """A thousand clusters in random order: one answer of the host serves all that lie in the same extent."""
    storage = ram(1000, holes)
    order = list(range(1000))
    random.Random(1).shuffle(order)
    found = run(lambda: ask_all(HostExtents(storage), [(page * PAGE, (page + 1) * PAGE) for page in order]))
    assert found == set(range(1000)) - holes
    assert storage.calls <= calls
    assert storage.trips <= 20


def test_one_large_range_of_many_extents_is_told_in_parts() -> None:
    """In order, a call for each extent; few at first, as a search may be over soon, then more at a time."""
    holes = set(range(1, 20000, 2))
    storage = ram(20000, holes)

    async def check() -> None:
        extents = HostExtents(storage)
        await extents.learn([(0, 20000 * PAGE)])
        assert len(extents.known(0, 20000 * PAGE)) <= 8
        assert await ask_all(extents, [(0, 20000 * PAGE)]) == set(range(20000)) - holes

    run(check)
    assert storage.calls <= 20100
    assert storage.trips <= 40


def test_what_is_asked_again_after_a_change_is_true() -> None:
    """However the old answers lie to the new ones, it comes to an end and tells the newest."""
    rnd = random.Random(3)
    storage = ram(64, set())

    async def check() -> None:
        extents = HostExtents(storage)
        for _ in range(2000):
            page, count = rnd.randrange(64), rnd.randrange(1, 9)
            if rnd.random() < 0.5:
                storage.file.punch(page * PAGE, min(count, 64 - page) * PAGE)
            else:
                storage.file.write(page * PAGE, b"y" * PAGE * min(count, 64 - page))
            start = rnd.randrange(64 * PAGE)
            await extents.learn([(start, 64 * PAGE)])
            (first, *_rest) = extents.known(start, 64 * PAGE)
            assert first.is_data == (start // PAGE in storage.file.pages)

    run(check)


@pytest.fixture(scope="module")
def terabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 TiB, all of it mapped and nothing of it stored: an image that was filled and discarded."""
    target = QedFuse(tmp_path_factory.mktemp("terabyte"))
    mapped_terabyte(target)
    return target.image


def test_a_discarded_terabyte_is_seen_in_no_time(terabyte: Path, tmp_path: Path) -> None:
    """16 million entries that lead to holes. Converting would take hours if they were read."""
    started = time.monotonic()
    entries = our_map(terabyte)
    mapping = time.monotonic() - started
    assert [(entry["length"], entry["data"], entry["zero"], entry["present"]) for entry in entries] == [
        (TIB, False, True, True)
    ]
    started = time.monotonic()
    assert qedfuse("convert", "-O", "raw", terabyte, tmp_path / "flat").code == 0
    print(f"figures: map {mapping:.1f} s, convert {time.monotonic() - started:.1f} s of 1 TiB of mapped holes")
    assert (tmp_path / "flat").stat().st_size == TIB and held(tmp_path / "flat") == 0


def test_seeking_through_a_discarded_terabyte_lets_others_run(terabyte: Path) -> None:
    """A machine that needs longer than 0.3 s to count the clusters may need so much longer for this, too."""
    count_them = partial(counting, TIB // (64 * KIB))

    async def check() -> None:
        async with open_image(terabyte, read_only=True) as image, breathing(0.02) as gaps:
            pace = count_them()
            started = time.thread_time()
            position: int | None = 0
            while position is not None and position < TIB:  # a busy machine makes it take longer than its patience
                position = await next_data(image, position)
            assert await next_hole(image, 12345) == 12345
            seconds = time.thread_time() - started
            pace = (pace + count_them()) / 2
            print(
                f"figures: {seconds:.2f} s of processor time, where counting takes {pace:.2f} s; "
                f"others waited for {max(gaps) * 1000:.1f} ms at most"
            )
            assert seconds < 5 * max(1, pace / 0.3)

    run(check)


def scattered(path: Path, tables: int) -> Segments:
    """64 TiB, as mkfs leaves it: so many tables, each of which has one page with one entry. Returns where the clusters
    are; every second one is stored."""
    geometry = Geometry()
    cluster, size = geometry.cluster_size, 64 * TIB
    unit = geometry.table_bytes + cluster
    first, count = cluster + geometry.table_bytes, size // geometry.l2_coverage
    found: Segments = []
    with path.open("wb") as file:
        file.write(Header(cluster, geometry.table_size, 1, 0, 0, 0, cluster, size).encode())
        l1 = [0] * count
        for number in range(tables):
            table = first + number * unit
            index = number * (count // tables)
            l1[index] = table
            page = number % geometry.table_pages
            file.seek(table + page * PAGE)
            file.write(words(table + geometry.table_bytes))
            if number % 2:
                file.seek(table + geometry.table_bytes)
                file.write(b"x" * cluster)
                start = index * geometry.l2_coverage + page * PAGE_ENTRIES * cluster
                found.append((start, start + cluster))
        file.seek(cluster)
        file.write(words(*l1))
        file.truncate(first + tables * unit)
    return found


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where files are read from now on."""
    reads: list[int] = []
    real = FileStorage.read_into_nowait

    def counted(self: FileStorage, offset: int, target: memoryview) -> bool:
        reads.append(offset)
        return real(self, offset, target)

    monkeypatch.setattr(FileStorage, "read_into_nowait", counted)
    return reads


def test_a_discard_of_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes over what the tables have holes for, and not over what was written there a moment ago."""
    path, tables = tmp_path / "image.qed", 1024
    scattered(path, tables)
    place = 3 * Geometry().l2_coverage + 5 * PAGE_ENTRIES * CLUSTER  # of a page that no table has yet

    async def check() -> None:
        async with open_image(path) as image:
            await image.write(place, b"new" * 1000)
            reads = counted_reads(monkeypatch)
            await image.zero(0, 64 * TIB)
            assert len(reads) < 3 * tables
            assert not any(await image.read(place, 3000))

    run(check)
    assert qedfuse("check", path).code == 0


def test_holes_of_tables_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the tables would be 64 pages each; the pages that are there are found without."""
    path, tables = tmp_path / "disk.qed", 1024
    expected = scattered(path, tables)
    reads = counted_reads(monkeypatch)

    async def check() -> None:
        async with open_image(path, read_only=True) as image:
            found = await find_segments(image, 0, data=True, ahead=60)
            assert found.ends == [end for segment in expected for end in segment][: len(found.ends)]
            assert len(found.ends) > 1000 and len(reads) < 3 * tables
            first, count = expected[0][0], 5  # what is in memory is not looked for
            for at in range(count):
                await image.read(first + at * CLUSTER, 1)
            assert await next_data(image, first - MIB) == first

    run(check)


def test_entries_that_are_only_in_memory_are_seen(tmp_path: Path) -> None:
    """Where the file has a hole in a table, and also once they were written while a search is under way."""
    path = tmp_path / "disk.qed"
    scattered(path, 1)
    page = PAGE_ENTRIES * CLUSTER  # what one page of a table maps

    async def check() -> None:
        async with open_image(path) as image:
            await image.write(5 * page, b"x" * CLUSTER)
            assert await next_data(image, 0) == 5 * page
            await image.flush()
            assert await next_data(image, 0) == 5 * page
            await image.write(9 * page, b"x" * CLUSTER)
            async with aclosing(walk(image, 0, image.size)) as entries:
                async for entry in entries:
                    if entry.start > 5 * page:  # it knows by now that the file has nothing more of the table
                        break
                await image.flush()
                for index in list(image.tables.l2.pages):
                    image.tables.l2.drop(index)
                found = [entry.start async for entry in entries if entry.data]
            assert found == [9 * page]

    run(check)


# -- hosts that do not tell -------------------------------------------------------------------------------------------


def test_a_block_device_has_no_holes(tmp_path: Path) -> None:
    image = full_image(tmp_path / "disk.qed", MIB)
    with device_with(image, 4 * MIB) as device:
        entries = our_map(device)
        assert [(entry["start"], entry["length"], entry["data"]) for entry in entries] == [(0, MIB, True)]


def test_a_host_that_may_not_answer_is_not_asked(tmp_path: Path) -> None:
    image = full_image(tmp_path / "disk.qed", MIB)
    punch_guest(image, (0, MIB))

    async def check() -> None:
        with image.open("rb") as file:
            storage = RemoteFile(str(image), os.dup(file.fileno()), False, 0)
        try:
            size = image.stat().st_size
            assert await storage.find_extents([(0, size)], 5) == [HostExtent(0, size, True)]
        finally:
            await storage.close()

    run(check)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_does_not_tell(code: int) -> None:
    class Silent(RamStorage):
        def next_data(self, offset: int) -> int | None:
            raise OSError(code, os.strerror(code))

    storage = Silent("ram", RamFile(), writable=False)
    assert run(lambda: storage.find_extents([(5, 10)], 3)) == [HostExtent(5, 1 << 63, True)]


def test_an_error_of_the_host_is_told(tmp_path: Path) -> None:
    class Broken(FileStorage):
        def next_data(self, offset: int) -> int | None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "file").write_bytes(b"x" * PAGE)

    async def check() -> None:
        storage = Broken.open(tmp_path / "file", writable=False)
        try:
            with pytest.raises(OSError, match="Input/output error") as caught:
                await storage.find_extents([(0, PAGE)], 1)
            assert caught.value.filename == str(tmp_path / "file")
        finally:
            await storage.close()

    run(check)


def test_preallocation_counts_holes_as_space_that_is_lacking(tmp_path: Path) -> None:
    """posix_fallocate over mapped clusters without data, on a host that has no room for them."""
    need_guest()
    with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs", "-o", "size=8M,huge=never") as host:
        image = full_image(host / "disk.qed", 4 * MIB)
        punch_guest(image, (0, 4 * MIB))
        (host / "ballast").write_bytes(b"b" * 6 * MIB)

        async def check() -> None:
            async with open_image(image) as opened:
                with pytest.raises(OSError, match="No space"):
                    await fallocate(opened, 0, 0, 4 * MIB)
                await fallocate(opened, 0, 0, MIB)

        run(check)
