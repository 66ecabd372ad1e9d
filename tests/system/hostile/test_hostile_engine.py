"""What hostile images and hosts taught the engine: each test is a case that once hung, crashed or lost data."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_image
from qedfuse.check.check import Repair, check_image
from qedfuse.errors import CorruptError
from qedfuse.host.file_storage import FileStorage
from qedfuse.qed.header import Header
from qedfuse.qed.image import Image
from qedfuse.sizes import MAX_OFFSET
from tests.helpers.doubles.ram import RamFile, RamStorage
from tests.helpers.images.hostile import GIANT, GOOD, C, entries, giant, good, wide, words
from tests.helpers.images.images import POOL, checked
from tests.helpers.judges.breathing import breathing
from tests.helpers.judges.expect import raises_errno
from tests.helpers.judges.seeking import next_data, next_hole
from tests.helpers.qemu.cli import environment, qemu_img

EXABYTES = (1 << 63) - 1


# -- time and responsiveness ------------------------------------------------------------------------------------------

ONE_TABLE = [17 * C] * 8192


@pytest.mark.parametrize(
    ("table", "seek"),
    [([1, 0] * 4096, next_data), ([34 * C] * 8192, next_hole), ([34 * C, 35 * C] * 4096, next_hole)],
    ids=["no data in 256 GiB", "no hole in 256 GiB", "no hole in 256 GiB of fragments"],
)
def test_a_long_seek_lets_others_run(
    table: list[int], seek: Callable[[Image, int], Awaitable[object]], tmp_path: Path
) -> None:
    async def run() -> None:
        async with open_image(wide(ONE_TABLE, table)(tmp_path), read_only=True) as image, breathing(0.5):
            with trio.move_on_after(3):
                await seek(image, 0)

    trio.run(run)


def test_exabytes_without_tables_take_no_time(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_image(giant([], clusters=17)(tmp_path)) as image:
            start = time.process_time()
            assert await next_data(image, 0) is None
            assert await next_hole(image, 12345) == 12345
            await image.zero(0, image.size)
            await image.discard(512, image.size)
            await image.resize(1 << 40)
            await image.resize(MAX_OFFSET)
            assert time.process_time() - start < 5

    trio.run(run)


@pytest.mark.parametrize("what", ["shrink", "zero"])
def test_a_long_change_lets_others_run_and_can_be_cancelled(what: str, tmp_path: Path) -> None:
    """Millions of fragments, punched one by one. A shrink takes a table once, so there must be many."""
    tables, data = 1024, 17 + 16 * 1024
    path = wide([(17 + 16 * number) * C for number in range(tables)], [], clusters=data + 1)(tmp_path)
    with path.open("r+b") as file:
        for number in range(tables):
            file.seek((17 + 16 * number) * C)
            file.write(words(*[1, data * C] * 4096))

    async def run() -> None:
        async with open_image(path) as image:
            async with breathing(0.5):
                with trio.move_on_after(0.5) as scope:  # before the timer commits: all share one table, which goes then
                    await (image.resize(512) if what == "shrink" else image.zero(0, image.size))
            assert scope.cancelled_caught
            await image.write(0, b"still here")
            assert bytes(await image.read(0, 10)) == b"still here"

    trio.run(run)


def test_one_look_at_the_tables_is_bounded(tmp_path: Path) -> None:
    """All pages are in memory, and somebody asks for the whole image at once."""

    async def run() -> None:
        async with open_image(wide([17 * C] * 64, [1, 34 * C] * 4096)(tmp_path), read_only=True) as image:
            for at in range(0, 64 * 8192 * C, 512 * C):
                await image.read(at, 1)
            runs = await image.map(0, image.size)
            assert 0 < len(runs) <= 1024

    trio.run(run)


# -- sizes ------------------------------------------------------------------------------------------------------------


class Counting(RamStorage):
    reads = 0

    def read_into_nowait(self, offset: int, target: memoryview) -> bool:
        self.reads += len(target)
        return super().read_into_nowait(offset, target)


def ram(header: Header, pieces: dict[int, bytes], size: int) -> RamFile:
    file = RamFile()
    for offset, piece in {0: header.encode(), **pieces}.items():
        file.write(offset, piece)
    file.truncate(size)
    return file


@pytest.mark.parametrize("repair", list(Repair))
def test_a_check_of_8_eib_for_4_clusters(repair: Repair) -> None:
    pieces = {C: entries({0: 3 * C}), 3 * C: entries({0: 5 * C, 1: 6 * C}), 5 * C: b"data" * 2048}
    file = ram(GOOD, pieces, EXABYTES)

    async def run() -> None:
        start = time.process_time()
        storage = RamStorage("ram", file)
        result = await check_image(storage, GOOD, repair=repair)
        unused = EXABYTES // C - 7 if repair is Repair.NONE else 0
        assert (result.corruptions, result.leaks, result.allocated_clusters) == (0, unused, 2)
        assert time.process_time() - start < 5

    trio.run(run)
    assert file.size == (EXABYTES if repair is Repair.NONE else 7 * C)


def test_a_check_reads_what_is_there() -> None:
    """A table of 1 GiB with 500 entries, each in a page of its own: 2 MiB are stored, and no more is read."""
    header = Header(GIANT, 16, 1, 0, 0, 0, GIANT, 1 << 50)
    pieces = {GIANT: words(17 * GIANT)} | {17 * GIANT + number * (2 << 20): words(1) for number in range(500)}
    storage = Counting("ram", ram(header, pieces, 33 * GIANT), writable=False)

    async def run() -> None:
        assert (await check_image(storage, header)).corruptions == 0

    trio.run(run)
    assert storage.reads <= 502 * C


def test_a_file_cannot_be_larger_than_off_t(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()

    async def run() -> None:
        storage = FileStorage.open(path, True)
        try:
            for size in (1 << 63, (1 << 64) + 5):
                with raises_errno(errno.EFBIG):
                    await storage.truncate(size)
        finally:
            await storage.close()

    trio.run(run)
    assert path.stat().st_size == 0


# -- clusters that are referred to twice ------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [{0: 5 * C, 1: 5 * C}, {0: 5 * C, 1: 6 * C, 2: 5 * C, 3: 6 * C}, {0: 3 * C, 1: C}])
def test_freed_twice(table: dict[int, int], tmp_path: Path) -> None:
    """And what is freed is the L2 table itself, or L1. The image goes on, and a repair makes it sound."""
    path = good(l2=table)(tmp_path)

    async def run() -> None:
        for _ in range(2):
            async with open_image(path) as image:
                for cluster in range(4):
                    await image.discard(cluster * C, C)
                await image.flush()
                await image.flush()
                for cluster in range(8):
                    await image.write(cluster * C, bytes([cluster]) * C)
                await image.flush()
                assert bytes(await image.read(7 * C, C)) == b"\7" * C
            storage = FileStorage.open(path, True)
            try:
                result = await check_image(storage, image.header, repair=Repair.ALL)
                assert result.corruptions == 0
            finally:
                await storage.close()

    trio.run(run)


# -- the host's limits ------------------------------------------------------------------------------------------------

_AT_THE_LIMIT = """
import resource, sys, trio
from qedfuse.chain.opening import open_image

LIMIT = 1 << 20

async def fill() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    async with open_image(sys.argv[1]) as image:
        done, step = 0, int(sys.argv[2])
        try:
            while True:
                await image.write(done, bytes([1 + done // step % 255]) * 4096)
                done += step
        except OSError as error:
            print(error.errno, done)
        await image.flush()
        await image.write(0, bytes([1]) * 4096)

trio.run(fill)
"""


@pytest.mark.parametrize("step", [4096, 2 << 20], ids=["clusters", "tables"])
def test_the_largest_file_that_the_host_allows(step: int, tmp_path: Path) -> None:
    """EFBIG for what does not fit, and everything before it is kept: no later flush fails for it."""
    path = tmp_path / "image.qed"
    qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=4k,table_size=2", path, "1G")
    command = [sys.executable, "-c", _AT_THE_LIMIT, str(path), str(step)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    code, written = map(int, done.stdout.split())
    assert code == errno.EFBIG
    assert path.stat().st_size <= 1 << 20
    number = written // step
    assert number * (4096 if step == 4096 else 3 * 4096) > (1 << 20) * 3 // 4, "most of the space was used"
    qemu_img("check", path)

    async def read() -> None:
        async with open_image(path, read_only=True) as image:
            for index in range(number):
                assert bytes(await image.read(index * step, 4096)) == bytes([1 + index % 255]) * 4096

    trio.run(read)


# -- entries that point where the file is going to grow ---------------------------------------------------------------


def test_nothing_is_read_past_the_end() -> None:
    """An entry for the cluster behind the file's last one: an error, not whatever comes there next."""
    pieces = {C: entries({0: 3 * C}), 3 * C: entries({0: 5 * C}), 4 * C: b""}
    file = ram(GOOD, pieces, 5 * C)

    async def run() -> None:
        storage = RamStorage("ram", file, writable=False)
        image = Image(storage, GOOD, None, writable=False, pool=POOL)
        with pytest.raises(CorruptError):
            await image.read(0, 4096)
        await image.close()
        assert (await checked(file)).corruptions == 1

    trio.run(run)
