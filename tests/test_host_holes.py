"""Clusters that have a place in a QED image and are holes of its file: what was discarded or zeroed, or never written.

`map`, SEEK_DATA and SEEK_HOLE, `convert` and `info` see them as they are in the host's file system: by its blocks, also
inside a cluster, in every image of a chain, and at no cost to speak of, however many there are.
"""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from qedfuse.extents import HostExtents
from qedfuse.file_storage import FileStorage
from qedfuse.geometry import PAGE_ENTRIES, Geometry
from qedfuse.header import Header
from qedfuse.holes import fallocate, find_segments, next_data, next_hole
from qedfuse.layer import Kind
from qedfuse.mapping import map_image, walk
from qedfuse.opening import open_image
from qedfuse.remote_file import RemoteFile
from qedfuse.storage import HostExtent
from tests.bench.targets import QedFuse
from tests.bench.workloads import mapped_terabyte
from tests.helpers.acknowledging import punch
from tests.helpers.breathing import breathing
from tests.helpers.chains import run
from tests.helpers.cli import qedfuse, qemu_img, qemu_io
from tests.helpers.devices import device_with
from tests.helpers.guests import MKFS, assert_clean, filesystem, need_filesystem, need_guest
from tests.helpers.hostile import words
from tests.helpers.modes import MODES, NEEDS_NATIVE, Mode
from tests.helpers.mounts import mounted
from tests.helpers.ram import PAGE, RamFile, RamStorage

KIB, MIB = 1 << 10, 1 << 20
TIB = 1 << 40
CLUSTER = 64 * KIB

Segments = list[tuple[int, int]]


@pytest.fixture(params=["ext4", "xfs", "btrfs", "tmpfs"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system for images, with blocks of 4 KiB."""
    name: str = request.param
    need_guest(*([] if name == "tmpfs" else [f"mkfs.{name}"]))
    need_filesystem(name)
    if name == "tmpfs":
        with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs", "-o", "huge=never") as point:
            yield point
        return
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(400 * MIB)
    subprocess.run([*MKFS[name], disk], check=True, timeout=60)
    with filesystem(disk, tmp_path / "host", "-o", "loop") as point:
        yield point


def full_image(path: Path, size: int, *options: str, pattern: int = 5) -> Path:
    """An image with data in every cluster."""
    qemu_img("create", "-q", "-f", "qed", *options, path, str(size))
    for start in range(0, size, 8 * MIB):
        qemu_io(path, f"write -P {pattern} {start} {min(8 * MIB, size - start)}")
    return path


def clusters_of(path: Path) -> list[int]:
    """Where each cluster of an image lies in its file."""

    async def find() -> list[int]:
        found = []
        async with open_image(path, read_only=True) as image:
            size = image.geometry.cluster_size
            for offset in range(0, image.size, size):
                (at,) = await image.map(offset, min(size, image.size - offset))
                assert at.kind is Kind.DATA
                found.append(at.host)
        return found

    return run(find)


def punch_guest(path: Path, *ranges: tuple[int, int]) -> None:
    """Give the host back what has these ranges (offset, size) of a full image, and change nothing of its tables."""
    places = clusters_of(path)
    with path.open("r+b") as file:
        for offset, size in ranges:
            while size:
                skip = offset % CLUSTER
                length = min(size, CLUSTER - skip)
                punch(file.fileno(), places[offset // CLUSTER] + skip, length)
                offset, size = offset + length, size - length
        os.fsync(file.fileno())


def our_map(path: Path, *words: str) -> list[dict[str, Any]]:
    done = qedfuse("map", "--output=json", *words, path)
    assert done.code == 0, done
    entries: list[dict[str, Any]] = json.loads(done.out)
    return entries


def data_of(entries: list[dict[str, Any]]) -> Segments:
    merged: Segments = []
    for entry in entries:
        start, end = entry["start"], entry["start"] + entry["length"]
        if not entry["data"]:
            continue
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, end))
    return merged


def segments(fd: int) -> Segments:
    """Data as lseek tells it."""
    result: Segments = []
    hole = 0
    while True:
        try:
            data = os.lseek(fd, hole, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return result
        hole = os.lseek(fd, data, os.SEEK_HOLE)
        result.append((data, hole))


def held(path: Path) -> int:
    return path.stat().st_blocks * 512


# -- map, info, convert -----------------------------------------------------------------------------------------------


def test_map_info_and_convert(host: Path) -> None:
    """Whole clusters, several at a time, and a block inside of one; QEMU reads the same and finds nothing wrong."""
    image = full_image(host / "disk.qed", 4 * MIB)
    before = json.loads(qedfuse("info", "--output=json", image).out)["actual-size"]
    punch_guest(image, (0, CLUSTER), (MIB, MIB), (3 * MIB + 8 * KIB, 4 * KIB))
    expected = [(CLUSTER, MIB), (2 * MIB, 3 * MIB + 8 * KIB), (3 * MIB + 12 * KIB, 4 * MIB)]

    entries = our_map(image)
    assert data_of(entries) == expected
    places = clusters_of(image)
    for entry in entries:  # a hole has its place in the file, too, and hides what is below
        assert entry["present"] and entry["zero"] is not entry["data"] and entry["depth"] == 0
        assert entry["offset"] == places[entry["start"] // CLUSTER] + entry["start"] % CLUSTER
    shown = [line.split() for line in qedfuse("map", image).out.splitlines()[1:]]
    assert [(int(row[0], 16), int(row[0], 16) + int(row[1], 16)) for row in shown] == expected

    after = json.loads(qedfuse("info", "--output=json", image).out)["actual-size"]
    assert after == held(image) <= before - MIB - CLUSTER

    for target, options in ((host / "sparse", ()), (host / "whole", ("-S", "0")), (host / "copy.qed", ("-O", "qed"))):
        done = qedfuse("convert", *(options if "-O" in options else ("-O", "raw", *options)), image, target)
        assert done.code == 0, done
        assert "identical" in qemu_img("compare", image, target, "-f", "qed")
    assert data_of(json.loads(qemu_img("map", "-f", "raw", "--output=json", host / "sparse"))) == expected
    assert held(host / "whole") >= 4 * MIB
    assert_clean(host / "copy.qed")
    assert_clean(image)


def test_what_is_reserved_and_not_written_is_a_hole(host: Path) -> None:
    """An unwritten extent, as the host tells it of a raw file."""
    image = full_image(host / "disk.qed", 2 * MIB)
    place = clusters_of(image)[3]
    done = subprocess.run(
        ["fallocate", "--zero-range", "--offset", str(place), "--length", str(CLUSTER), str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "not supported" in done.stderr:
        pytest.skip("this host cannot reserve space in a file")
    assert done.returncode == 0, done
    theirs = json.loads(qemu_img("map", "-f", "raw", "--output=json", image))
    told = next(entry for entry in theirs if entry["start"] <= place < entry["start"] + entry["length"])
    ours = next(entry for entry in our_map(image) if entry["start"] <= 3 * CLUSTER < entry["start"] + entry["length"])
    assert (ours["data"], ours["zero"]) == (told["data"], told["zero"])


def test_in_every_image_of_a_chain(tmp_path: Path) -> None:
    """A hole of the middle hides the base; where nothing is mapped the base's own holes show."""
    base = full_image(tmp_path / "base.qed", 4 * MIB)
    middle = full_image(tmp_path / "middle.qed", MIB, "-b", str(base), "-F", "qed", pattern=6)
    top = tmp_path / "top.qed"
    qemu_img("create", "-q", "-f", "qed", "-b", middle, "-F", "qed", top, str(4 * MIB))
    qemu_io(top, "write -P 7 0 128k")
    punch_guest(base, (0, MIB), (2 * MIB, MIB))
    punch_guest(middle, (CLUSTER, 2 * CLUSTER), (512 * KIB, 4 * KIB))
    entries = our_map(top)
    assert data_of(entries) == [(0, 2 * CLUSTER), (3 * CLUSTER, 512 * KIB), (516 * KIB, MIB)]
    assert {entry["depth"] for entry in entries if entry["present"]} == {0, 1}
    entries = our_map(middle)
    assert data_of(entries) == [(0, CLUSTER), (3 * CLUSTER, 512 * KIB), (516 * KIB, MIB)]
    entries = our_map(base)
    assert data_of(entries) == [(MIB, 2 * MIB), (3 * MIB, 4 * MIB)]
    overlay = tmp_path / "overlay.qed"
    qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "qed", overlay)
    assert data_of(our_map(overlay)) == [(MIB, 2 * MIB), (3 * MIB, 4 * MIB)]
    assert {entry["depth"] for entry in our_map(overlay)} == {1}
    assert qedfuse("convert", "-O", "raw", overlay, tmp_path / "flat").code == 0
    assert held(tmp_path / "flat") <= 2 * MIB + CLUSTER
    assert "identical" in qemu_img("compare", overlay, tmp_path / "flat")


def test_over_a_backing_file_convert_skips_what_both_lack(tmp_path: Path) -> None:
    base = full_image(tmp_path / "base.qed", 4 * MIB)
    image = full_image(tmp_path / "disk.qed", 4 * MIB, pattern=9)
    punch_guest(base, (0, 2 * MIB))
    punch_guest(image, (MIB, 2 * MIB))
    target = tmp_path / "target.qed"
    done = qedfuse("convert", "-O", "qed", "-B", base, "-F", "qed", image, target)
    assert done.code == 0, done
    assert "identical" in qemu_img("compare", image, target)
    entries = [(entry["depth"], entry["start"], entry["length"]) for entry in our_map(target) if entry["data"]]
    assert entries == [(0, 0, MIB), (0, 3 * MIB, MIB)]
    assert_clean(target)


@pytest.mark.parametrize("seed", range(3))
def test_at_random(tmp_path: Path, seed: int) -> None:
    """Clusters in any order in the file, holes of any number of blocks: found by map and by seeking, wherever from."""
    rnd = random.Random(seed)
    size, cluster = 2 * MIB, rnd.choice([4 * KIB, 64 * KIB, 1 * MIB])
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", "-o", f"cluster_size={cluster}", path, str(size))
    order = list(range(size // cluster))
    rnd.shuffle(order)
    written = order[: len(order) * 3 // 4 + 1]
    qemu_io(path, *(f"write -P 1 {number * cluster} {cluster}" for number in written))
    data = {number * cluster + at for number in written for at in range(0, cluster, 4 * KIB)}

    async def punch_some() -> None:
        async with open_image(path, read_only=True) as image:
            with path.open("r+b") as file:
                for _ in range(80):
                    block = rnd.choice(sorted(data)) if data else 0
                    for at in range(block, min(size, block + rnd.choice([1, 2, 5]) * 4 * KIB), 4 * KIB):
                        (run_,) = await image.map(at, 4 * KIB)
                        if run_.kind is Kind.DATA:
                            punch(file.fileno(), run_.host, 4 * KIB)
                            data.discard(at)

    async def check() -> None:
        async with open_image(path, read_only=True) as image:
            async with aclosing(map_image(image)) as entries:
                found = {
                    at
                    async for entry in entries
                    if entry.data
                    for at in range(entry.start, entry.start + entry.length, 4 * KIB)
                }
            assert found == data
            content = bytes(await image.read(0, size))
            assert all(content[at : at + 4 * KIB] == b"\1" * 4 * KIB for at in data)
            for offset in rnd.sample(range(size), 200):
                inside = offset & -4 * KIB in data
                after = min((at for at in data if at > offset), default=None)
                assert await next_data(image, offset) == (offset if inside else after)
                position = offset
                while position < size and position & -4 * KIB in data:
                    position = (position & -4 * KIB) + 4 * KIB
                assert await next_hole(image, offset) == position

    run(punch_some)
    run(check)


# -- at the mount -----------------------------------------------------------------------------------------------------


@MODES
def test_st_blocks_and_the_tools_that_trust_them(host: Path, tmp_path: Path, raw: Path, mode: Mode) -> None:
    image = full_image(host / "disk.qed", 16 * MIB)
    punch_guest(image, (2 * MIB, 12 * MIB), (15 * MIB + 4 * KIB, 8 * KIB))
    with mounted(*mode, "--ro", image, raw):
        assert held(raw) == held(image) < 6 * MIB
        assert int(subprocess.check_output(["du", "-B1", raw]).split()[0]) == held(image)
        copies = [host / "copy", host / "unpacked" / raw.name]
        subprocess.run(["cp", "--sparse=auto", raw, copies[0]], check=True, timeout=60)
        subprocess.run(["tar", "-C", raw.parent, "--sparse", "-cf", host / "x.tar", raw.name], check=True, timeout=60)
        copies[1].parent.mkdir()
        subprocess.run(["tar", "-C", copies[1].parent, "-xf", host / "x.tar"], check=True, timeout=60)
        for copy in copies:
            subprocess.run(["cmp", raw, copy], check=True, timeout=60)
            assert "identical" in qemu_img("compare", "-f", "qed", "-F", "raw", image, copy)


@NEEDS_NATIVE[0]
@NEEDS_NATIVE[1]
@NEEDS_NATIVE[2]
@pytest.mark.parametrize("options", [(), ("-o", "direct_io")], ids=["cached", "direct_io"])
def test_seeking_through_a_mount(host: Path, raw: Path, options: tuple[str, ...]) -> None:
    """Holes by blocks; what is written into one, in place, is no hole any more, whatever was found before."""
    image = full_image(host / "disk.qed", 16 * MIB)
    punch_guest(image, (2 * MIB, 12 * MIB), (15 * MIB + 4 * KIB, 8 * KIB))
    end = [(14 * MIB, 15 * MIB + 4 * KIB), (15 * MIB + 12 * KIB, 16 * MIB)]
    with mounted(*options, image, raw):
        fd = os.open(raw, os.O_RDWR)
        try:
            assert segments(fd) == [(0, 2 * MIB), *end]
            assert os.lseek(fd, 2 * MIB + 5, os.SEEK_HOLE) == 2 * MIB + 5
            for number in range(3, 6):
                block = number * MIB + number * 4 * KIB
                assert os.lseek(fd, block - MIB // 2, os.SEEK_DATA) == 14 * MIB
                assert os.lseek(fd, block, os.SEEK_HOLE) == block
                os.pwrite(fd, b"x" * 4 * KIB, block)
                assert os.lseek(fd, block - MIB // 2, os.SEEK_DATA) == block
                assert os.lseek(fd, block, os.SEEK_HOLE) == block + 4 * KIB
                punch(fd, block & -CLUSTER, CLUSTER)
                assert os.lseek(fd, block - MIB // 2, os.SEEK_DATA) == 14 * MIB
            os.pwrite(fd, b"y" * MIB, 4 * MIB)
            assert segments(fd) == [(0, 2 * MIB), (4 * MIB, 5 * MIB), *end]
        finally:
            os.close(fd)


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
    async def check() -> None:
        async with open_image(terabyte, read_only=True) as image, breathing(0.02) as gaps:
            started = time.thread_time()
            position: int | None = 0
            while position is not None and position < TIB:  # a busy machine makes it take longer than its patience
                position = await next_data(image, position)
            assert await next_hole(image, 12345) == 12345
            seconds = time.thread_time() - started
            print(f"figures: {seconds:.2f} s of processor time; others waited for {max(gaps) * 1000:.1f} ms at most")
            assert seconds < 5

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


def test_holes_of_tables_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the tables would be 64 pages each; the pages that are there are found without."""
    path, tables = tmp_path / "disk.qed", 1024
    expected = scattered(path, tables)
    reads = 0
    real = FileStorage.read_into_nowait

    def counted(self: FileStorage, offset: int, target: memoryview) -> bool:
        nonlocal reads
        reads += 1
        return real(self, offset, target)

    monkeypatch.setattr(FileStorage, "read_into_nowait", counted)

    async def check() -> None:
        async with open_image(path, read_only=True) as image:
            found = await find_segments(image, 0, data=True, ahead=60)
            assert found.ends == [end for segment in expected for end in segment][: len(found.ends)]
            assert len(found.ends) > 1000 and reads < 3 * tables
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
