"""Finding and making holes, on the engine."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qedfuse.chain.opening import open_image
from qedfuse.fuse.fallocate import fallocate
from qedfuse.fuse.last_seek import LastSegments
from qedfuse.host.file_storage import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from qedfuse.layers import seek
from qedfuse.layers.layer import Layer
from qedfuse.layers.runs import Kind, Run
from qedfuse.layers.seek import find_segments
from qedfuse.qed.image import Image
from tests.helpers.images.chains import run
from tests.helpers.images.hostile import C, wide, words
from tests.helpers.judges.seeking import next_data, next_hole
from tests.helpers.qemu.cli import qemu_img

KIB = 1 << 10
MIB = 1 << 20
TIB = 1 << 40
CLUSTER = 64 * KIB
#: What a hole of the host begins with.
BLOCK = 4096
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

Segments = list[tuple[int, int]]


async def segments(layer: Layer) -> Segments:
    """The data of a layer, as `cp --sparse` would walk it."""
    result = []
    offset = await next_data(layer, 0)
    while offset is not None:
        hole = await next_hole(layer, offset)
        assert hole > offset
        result.append((offset, hole))
        offset = await next_data(layer, hole)
    return result


@asynccontextmanager
async def new_image(directory: Path, size: int | str, *options: object) -> AsyncIterator[Image]:
    path = directory / "top.qed"
    qemu_img("create", "-q", "-f", "qed", *options, path, size)
    async with open_image(path) as image:
        yield image


def sparse_file(path: Path, size: int, data: Segments) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for start, end in data:
            file.seek(start)
            file.write(b"\xaa" * (end - start))
    return path


# -- finding ----------------------------------------------------------------------------------------------------------


def test_an_empty_image_is_one_hole(tmp_path: Path) -> None:
    async def check() -> None:
        async with new_image(tmp_path, "1G") as image:
            assert await next_data(image, 0) is None
            assert await next_data(image, image.size) is None
            assert await next_hole(image, 12345) == 12345
            assert await segments(image) == []

    run(check)


def test_tables_that_do_not_exist_are_passed_over_together(tmp_path: Path) -> None:
    """QEMU asks for each 2 GiB again: a search must not look at every table on its way."""

    async def check() -> None:
        async with new_image(tmp_path, "64T") as image:
            assert await next_data(image, 0) is None
            assert await image.map(CLUSTER, image.size - CLUSTER) == [Run(Kind.UNALLOCATED, image.size - CLUSTER)]
            table = image.geometry.l2_coverage
            for index in (0, 3, 511, 513):
                await image.write(index * table + 5 * CLUSTER, b"x" * CLUSTER)
            starts = [index * table + 5 * CLUSTER for index in (0, 3, 511, 513)]
            assert await segments(image) == [(start, start + CLUSTER) for start in starts]

    run(check)


def test_data_is_found_by_clusters(tmp_path: Path) -> None:
    async def check() -> None:
        async with new_image(tmp_path, 100 * MIB + 512) as image:
            last = image.size // CLUSTER * CLUSTER
            for offset in (0, 5 * CLUSTER, 6 * CLUSTER, 80 * MIB, last):
                await image.write(offset, b"x" * min(CLUSTER, image.size - offset))
            assert await segments(image) == [
                (0, CLUSTER),
                (5 * CLUSTER, 7 * CLUSTER),
                (80 * MIB, 80 * MIB + CLUSTER),
                (last, image.size),
            ]
            assert await next_data(image, 100) == 100
            assert await next_data(image, CLUSTER) == 5 * CLUSTER
            assert await next_hole(image, 5 * CLUSTER + 1) == 7 * CLUSTER
            assert await next_hole(image, last + 1) == image.size

    run(check)


def test_zero_clusters_hide_the_backing_file(tmp_path: Path) -> None:
    base = sparse_file(tmp_path / "base.raw", 4 * MIB, [(0, 4 * MIB)])

    async def check() -> None:
        async with new_image(tmp_path, "4M", "-b", base, "-F", "raw") as image:
            assert await segments(image) == [(0, 4 * MIB)]
            await image.zero(MIB, 2 * MIB)
            assert await segments(image) == [(0, MIB), (3 * MIB, 4 * MIB)]

    run(check)


def test_holes_of_a_raw_backing_file_are_holes(tmp_path: Path) -> None:
    """At the host's granularity; what lies past the backing file's end is a hole, too."""
    data = [(64 * KIB, 128 * KIB), (MIB, MIB + 8 * KIB)]
    base = sparse_file(tmp_path / "base.raw", 2 * MIB, data)

    async def check() -> None:
        async with new_image(tmp_path, "8M", "-b", base, "-F", "raw") as image:
            assert await segments(image) == data
            await image.write(4 * MIB, b"x" * CLUSTER)
            assert await segments(image) == [*data, (4 * MIB, 4 * MIB + CLUSTER)]
            assert await next_hole(image, MIB + 4 * KIB) == MIB + 8 * KIB

    run(check)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_in_a_hole_reads_as_zeroes(tmp_path: Path, seed: int) -> None:
    """A chain of two images over a raw file, written and zeroed at random."""
    rnd = random.Random(seed)
    size = 4 * MIB
    starts = sorted(rnd.sample(range(0, 1024, 2), 20))
    base = sparse_file(tmp_path / "base.raw", size, [(n * 4 * KIB, (n + 1) * 4 * KIB) for n in starts])
    middle = tmp_path / "middle.qed"
    qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=4096", "-b", base, "-F", "raw", middle)

    async def scribble(image: Image) -> None:
        for _ in range(60):
            offset = rnd.randrange(size)
            length = min(rnd.randrange(1, 20_000), size - offset)
            if rnd.random() < 0.5:
                await image.write(offset, rnd.randbytes(length))
            else:
                await image.zero(offset, length)

    async def check() -> None:
        async with open_image(middle) as image:
            await scribble(image)
        async with new_image(tmp_path, size, "-o", "cluster_size=4096", "-b", middle, "-F", "qed") as image:
            await scribble(image)
            content = bytes(await image.read(0, size))
            found = await segments(image)
            assert 10 < len(found)
            end = 0
            for start, stop in [*found, (size, size)]:
                assert content[end:start] == bytes(start - end)
                end = stop
            for offset in rnd.sample(range(size), 200):
                inside = next((segment for segment in found if segment[0] <= offset < segment[1]), None)
                after = next((start for start, _ in found if start > offset), None)
                assert await next_data(image, offset) == (offset if inside else after)
                assert await next_hole(image, offset) == (inside[1] if inside else offset)

    run(check)


def test_64_tib_are_scanned_in_no_time(tmp_path: Path) -> None:
    async def check() -> None:
        async with new_image(tmp_path, "64T") as image:
            assert image.size == 64 * TIB
            await image.write(63 * TIB, b"x" * CLUSTER)
            begin = time.perf_counter()
            cluster = 63 * TIB
            assert await segments(image) == [(cluster, cluster + CLUSTER)]
            assert await next_data(image, cluster + CLUSTER) is None
            assert time.perf_counter() - begin < 2

    run(check)


def test_a_search_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GiB of zeroes in 8192 tables that are all one and the same: the answers come soon, and are no lies."""
    image = wide([17 * C] * 8191 + [36 * C], [0, 1] * 4096, clusters=60)(tmp_path)
    with image.open("r+b") as file:  # one cluster of data, behind all of that
        file.seek(36 * C)
        file.write(words(0, 1, 0, 34 * C))
    place = 8191 * 8192 * C + 3 * C

    async def check() -> None:
        async with open_image(image, read_only=True) as opened:
            started = time.monotonic()
            found = [await next_data(opened, 0)]
            assert seek.PATIENCE <= time.monotonic() - started < seek.PATIENCE + 2
            monkeypatch.setattr(seek, "PATIENCE", 0.1)
            for _ in range(5):
                assert found[-1] is not None
                found.append(await next_data(opened, found[-1]))
            assert found == sorted(set(found)) and found[-1] < place  # type: ignore[operator, type-var]
            assert await next_data(opened, place - 100 * C) == place
            assert await next_hole(opened, place) == place + C
            assert await next_data(opened, place + C) is None

    run(check)


def test_a_hole_that_takes_too_long_to_find_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with new_image(tmp_path, 64 * MIB) as image:
            await image.write(0, b"a" * MIB)
            await image.write(2 * MIB, b"b" * MIB)
            await image.write(MIB, b"c" * CLUSTER)  # not where its neighbours are
            monkeypatch.setattr(seek, "PATIENCE", -1)
            assert await next_hole(image, 0) == image.size
            assert await next_hole(image, MIB) == MIB + CLUSTER
            assert await next_hole(image, 3 * MIB) == 3 * MIB

    run(check)


# -- making -----------------------------------------------------------------------------------------------------------


def test_punching_gives_back_whole_blocks_and_zeroes_the_rest(tmp_path: Path) -> None:
    async def check() -> None:
        async with new_image(tmp_path, "4M") as image:
            await image.write(0, b"x" * 4 * MIB)
            await fallocate(image, PUNCH, MIB + 100, MIB)
            expected = b"x" * (MIB + 100) + bytes(MIB) + b"x" * (2 * MIB - 100)
            assert bytes(await image.read(0, 4 * MIB)) == expected
            assert await segments(image) == [(0, MIB + BLOCK), (2 * MIB, 4 * MIB)]
            await image.flush()
            used = os.stat(image.path).st_blocks * 512
            await fallocate(image, PUNCH, 2 * MIB, 2 * MIB)
            await image.flush()
            assert os.stat(image.path).st_blocks * 512 <= used - 2 * MIB + CLUSTER  # the host may need more metadata
            assert image.size == 4 * MIB

    run(check)


def test_punching_past_the_end_keeps_the_size(tmp_path: Path) -> None:
    async def check() -> None:
        async with new_image(tmp_path, "4M") as image:
            await image.write(0, b"x" * 4 * MIB)
            await fallocate(image, PUNCH, 3 * MIB, 1 << 40)
            await fallocate(image, PUNCH, 1 << 41, MIB)
            assert image.size == 4 * MIB
            assert await segments(image) == [(0, 3 * MIB)]

    run(check)


def test_zero_range_grows_unless_told_not_to(tmp_path: Path) -> None:
    async def check() -> None:
        async with new_image(tmp_path, "4M") as image:
            await image.write(0, b"x" * 4 * MIB)
            await fallocate(image, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 3 * MIB, 3 * MIB)
            assert image.size == 4 * MIB
            assert await segments(image) == [(0, 3 * MIB)]
            await fallocate(image, FALLOC_FL_ZERO_RANGE, 2 * MIB, 3 * MIB)
            assert image.size == 5 * MIB
            assert await segments(image) == [(0, 2 * MIB)]

    run(check)


def test_preallocation_grows_and_stores_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        async with new_image(tmp_path, "4M") as image:
            await image.write(0, b"x" * CLUSTER)
            await fallocate(image, 0, MIB, MIB)
            await fallocate(image, FALLOC_FL_KEEP_SIZE, 3 * MIB, 3 * MIB)
            assert image.size == 4 * MIB
            await fallocate(image, 0, 3 * MIB, 3 * MIB + 1)
            assert image.size == 6 * MIB + 512
            assert await segments(image) == [(0, CLUSTER)]

    run(check)


def test_preallocation_is_refused_if_the_host_is_too_small(tmp_path: Path) -> None:
    async def check() -> None:
        async with new_image(tmp_path, "64T") as image:
            for offset, mode in ((0, 0), (0, FALLOC_FL_KEEP_SIZE), (image.size, FALLOC_FL_KEEP_SIZE)):
                with pytest.raises(OSError, match="No space") as caught:
                    await fallocate(image, mode, offset, 64 * TIB)
                assert caught.value.errno == errno.ENOSPC

    run(check)


@pytest.mark.parametrize("mode", [0x08, 0x20, 0x40, FALLOC_FL_PUNCH_HOLE, PUNCH | FALLOC_FL_ZERO_RANGE])
def test_what_cannot_be_done_is_refused(tmp_path: Path, mode: int) -> None:
    async def check() -> None:
        async with new_image(tmp_path, "4M") as image:
            await image.write(0, b"x" * MIB)
            with pytest.raises(OSError, match="not supported") as caught:
                await fallocate(image, mode, 0, MIB)
            assert caught.value.errno == errno.EOPNOTSUPP
            assert await segments(image) == [(0, MIB)]

    run(check)


# -- what is found at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 60])
def test_a_search_finds_what_is_asked_for_and_on_demand_what_comes_next(tmp_path: Path, ahead: float) -> None:
    """Wherever it begins; and what it knows of any place is what a search from there finds."""

    async def check() -> None:
        async with new_image(tmp_path, 64 * CLUSTER + 512) as image:
            for cluster in (0, 1, 5, 9, 10, 11, 40, 64):
                await image.write(cluster * CLUSTER, b"x" * min(CLUSTER, image.size - cluster * CLUSTER))
            for offset in range(0, image.size + CLUSTER, CLUSTER // 2):
                for data in (True, False):
                    found = await find_segments(image, offset, data=data, ahead=ahead)
                    assert found.start == offset
                    assert found.is_data == (await next_data(image, offset) == offset)
                    if offset >= image.size:
                        assert found.ends == []
                    elif ahead:
                        assert found.ends[-1] == image.size
                    else:
                        assert len(found.ends) <= (0 if data and found.is_data else 1 + found.is_data)
                    for place in range(0, image.size + CLUSTER, CLUSTER // 2):
                        if not offset <= place < max(found.ends, default=0):
                            assert found.seek(place, data=data) is None
                            continue
                        there = await next_data(image, place) if data else await next_hole(image, place)
                        assert found.seek(place, data=data) == (image.size if there is None else there)

    run(check)


def test_a_search_ahead_ends_in_time(tmp_path: Path) -> None:
    """A hundred thousand segments: not all of them are looked for when the first is asked for."""

    async def check() -> None:
        async with new_image(tmp_path, "1G", "-o", "cluster_size=4096") as image:
            for cluster in range(0, 20_000, 2):
                await image.write(cluster * 4096, b"x" * 4096)
            started = time.process_time()
            found = await find_segments(image, 0, data=False, ahead=60)
            assert 1000 < len(found.ends) <= 1024
            assert found.ends == [4096 * number for number in range(1, len(found.ends) + 1)]
            assert time.process_time() - started < 1
            assert len((await find_segments(image, 0, data=False, ahead=0.001)).ends) >= 2

    run(check)


def test_what_was_found_last_holds_until_something_is_written(tmp_path: Path) -> None:
    async def check() -> None:
        async with new_image(tmp_path, 64 * CLUSTER) as image:
            for cluster in (0, 1, 5, 9, 10, 63):
                await image.write(cluster * CLUSTER, b"x" * CLUSTER)
            last = LastSegments()
            assert last.find(image, 0, data=True) is None
            last.note(image, image.version, await find_segments(image, 2 * CLUSTER, data=True, ahead=60))
            for offset in range(0, image.size + CLUSTER, CLUSTER // 2):
                for data in (True, False):
                    found = last.find(image, offset, data=data)
                    if not 2 * CLUSTER <= offset < image.size:
                        assert found is None
                        continue
                    there = await find_segments(image, offset, data=data, ahead=60)
                    assert found == there
                    assert last.seek(image, offset, data=data) == there.seek(offset, data=data)
            await image.write(5 * CLUSTER, b"y")  # in place
            assert last.find(image, 5 * CLUSTER, data=True) is None
            last.note(image, image.version, await find_segments(image, 0, data=True))
            assert last.find(image, 0, data=True) is None  # where the data ends was not looked for

    run(check)
