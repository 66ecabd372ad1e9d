"""Files that are open past the kernel's cache: writers in parallel, and all others see what they write."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from qedfuse.fuse.page_cache import TICK
from tests.helpers.mounts.fastpath_modes import flat
from tests.helpers.mounts.meeting import MANY
from tests.helpers.mounts.modes import MODES, NEEDS_DIRECT, Mode
from tests.helpers.mounts.mounts import mounted, mountpoint, opened, status, wait_until
from tests.helpers.mounts.system_calls import system_calls
from tests.helpers.qemu.cli import qemu_img

SECTOR = 512
PAGE = 4096
CLUSTER = 1 << 16
MIB = 1 << 20
SIZE = 4 * MIB

OPTIONS = pytest.mark.parametrize("options", [(), ("-o", "direct_io")], ids=["cached", "direct_io"])


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (raw := tmp_path / "disk.raw").touch()
    return raw


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Over a backing file, so that there is something to copy."""
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(5).randbytes(SIZE // 2))
    qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "raw", tmp_path / "disk.qed", str(SIZE))
    return tmp_path / "disk.qed"


class Direct:
    """Reads and writes by a descriptor with O_DIRECT, of aligned memory."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, offset: int, size: int) -> bytes:
        with mmap.mmap(-1, size) as buffer:
            done = os.preadv(self._fd, [buffer], offset)
            return buffer[:done]

    def write(self, offset: int, data: bytes) -> None:
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            assert os.pwrite(self._fd, buffer, offset) == len(data)


@pytest.mark.parametrize("native", [pytest.param(True, marks=NEEDS_DIRECT)])
@OPTIONS
def test_writers_need_not_wait_for_each_other(raw: Path, image: Path, options: tuple[str, ...], native: bool) -> None:
    """Each write is done only when the others have come, too."""
    with (
        mounted(*options, image, raw, foreground=True, module="tests.helpers.mounts.meeting"),
        opened(raw, os.O_RDWR | os.O_DIRECT | os.O_DSYNC) as fd,
        ThreadPoolExecutor(MANY) as pool,
    ):
        writes = [pool.submit(Direct(fd).write, number * CLUSTER, b"%d" % number * PAGE) for number in range(MANY)]
        for write in writes:
            write.result()
    content = flat(image)
    for number in range(MANY):
        assert content[number * CLUSTER :][:PAGE] == b"%d" % number * PAGE


@MODES
@OPTIONS
def test_all_see_the_same(raw: Path, image: Path, mode: Mode, options: tuple[str, ...]) -> None:
    """Direct, buffered and mapped, in any order, of one file."""
    rnd = random.Random(7)
    model = bytearray(flat(image))
    with mounted(*mode, *options, image, raw), ExitStack() as stack:
        buffered = stack.enter_context(opened(raw))
        direct = Direct(stack.enter_context(opened(raw, os.O_RDWR | os.O_DIRECT)))
        writers: list[Callable[[int, bytes], object]] = [
            direct.write,
            lambda offset, data: os.pwrite(buffered, data, offset),
        ]
        readers: list[Callable[[int, int], bytes]] = [
            direct.read,
            lambda offset, size: os.pread(buffered, size, offset),
        ]
        if not options:
            view = stack.enter_context(mmap.mmap(buffered, SIZE))

            def store(offset: int, data: bytes) -> None:
                view[offset : offset + len(data)] = data

            writers.append(store)
            readers.append(lambda offset, size: view[offset : offset + size])
        for _ in range(400):
            offset, size = (rnd.randrange(0, 256) * SECTOR for _ in range(2))
            size = max(SECTOR, min(size, SIZE - offset))
            rnd.choice(writers)(offset, data := rnd.randbytes(size))
            model[offset : offset + size] = data
            offset, size = max(0, offset - 8 * SECTOR), size + 16 * SECTOR
            assert rnd.choice(readers)(offset, size) == model[offset : offset + size]
        for read in readers:
            assert read(0, SIZE) == model
    assert flat(image) == model


@MODES
@pytest.mark.parametrize("over_file", [True, False], ids=["file", "directory"])
def test_a_file_ends_where_the_kernel_says(tmp_path: Path, image: Path, mode: Mode, over_file: bool) -> None:
    """What is in its cache only makes the file longer than the image, and there is no end of file before that."""
    point, raw = mountpoint(tmp_path, over_file=over_file)
    with mounted(*mode, image, point), opened(raw) as fd, opened(raw, os.O_RDWR | os.O_DIRECT) as other:
        direct = Direct(other)
        for size in (2 * SIZE, 2 * SIZE + SECTOR):
            os.pwrite(fd, b"x" * SECTOR, size - SECTOR)
            assert direct.read(SIZE + PAGE, PAGE) == bytes(PAGE)
        os.pwrite(fd, b"y" * SECTOR, 3 * SIZE)
        assert direct.read(size - PAGE, 2 * PAGE) == bytes(PAGE - 2 * SECTOR) + b"x" * 2 * SECTOR + bytes(PAGE)
        assert direct.read(3 * SIZE, PAGE) == b"y" * SECTOR
        assert direct.read(3 * SIZE + SECTOR, PAGE) == b""


@pytest.mark.parametrize("native", [pytest.param(True, marks=NEEDS_DIRECT)])
@OPTIONS
def test_a_direct_handle_can_be_mapped(raw: Path, image: Path, options: tuple[str, ...], native: bool) -> None:
    with mounted(*options, image, raw), opened(raw, os.O_RDWR | os.O_DIRECT) as fd:
        direct = Direct(fd)
        with mmap.mmap(fd, SIZE) as view:
            direct.write(PAGE, b"d" * PAGE)
            assert view[PAGE : 2 * PAGE] == b"d" * PAGE
            view[PAGE : PAGE + 5] = b"store"
            assert direct.read(PAGE, PAGE) == b"store" + b"d" * (PAGE - 5)
            view[3 * MIB] = 33  # where nothing was
            assert os.lseek(fd, 2 * MIB, os.SEEK_DATA) == 3 * MIB
            view[0] = 1
            view.flush()
    content = flat(image)
    assert (content[0], content[PAGE : PAGE + 6], content[3 * MIB]) == (1, b"stored", 33)


@pytest.mark.parametrize("native", [pytest.param(True, marks=NEEDS_DIRECT)])
@OPTIONS
@pytest.mark.parametrize("end", [PAGE - 24, PAGE + 1])
def test_what_is_cut_off_of_a_map_is_gone(
    raw: Path, image: Path, options: tuple[str, ...], end: int, native: bool
) -> None:
    """Up to the byte, though an image ends with a sector."""
    with mounted(*options, image, raw), opened(raw, os.O_RDWR | os.O_DIRECT) as fd, mmap.mmap(fd, 2 * PAGE) as view:
        view[:] = b"x" * 2 * PAGE
        os.ftruncate(fd, end)
        assert os.fstat(fd).st_size == (-(-end // SECTOR) * SECTOR if options else end)
        os.ftruncate(fd, SIZE)
        expected = b"x" * end + bytes(2 * PAGE - end)
        assert (view[:], Direct(fd).read(0, 2 * PAGE)) == (expected, expected)
    assert flat(image) == expected + bytes(SIZE - 2 * PAGE)


@MODES
@OPTIONS
def test_of_writes_that_overlap_each_sector_has_one(
    raw: Path, image: Path, mode: Mode, options: tuple[str, ...]
) -> None:
    """As on a block device, and none that was overwritten by its own writer."""
    last: list[dict[int, bytes]] = [{} for _ in range(4)]  # by writer and sector

    def work(writer: int, direct: Direct) -> None:
        rnd = random.Random(writer)
        for number in range(300):
            first, count = rnd.randrange(0, 1000), rnd.randrange(1, 300)
            tag = b"%d:%06d|" % (writer, number)
            direct.write(first * SECTOR, (tag * (SECTOR // len(tag) + 1))[:SECTOR] * count)
            last[writer].update(dict.fromkeys(range(first, first + count), tag))

    with mounted(*mode, *options, image, raw), ExitStack() as stack:
        fds = [stack.enter_context(opened(raw, os.O_RDWR | os.O_DIRECT)) for _ in last]
        threads = [threading.Thread(target=work, args=(number, Direct(fd))) for number, fd in enumerate(fds)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    content = flat(image)
    for sector in range(1300):
        found = content[sector * SECTOR :][:SECTOR]
        candidates = [tags[sector] for tags in last if sector in tags]
        if candidates:
            tag = found[:9]
            assert tag in candidates
            assert found == (tag * (SECTOR // len(tag) + 1))[:SECTOR]


@pytest.mark.parametrize("native", [pytest.param(True, marks=NEEDS_DIRECT)])
@pytest.mark.parametrize("single", [False, True], ids=["O_DSYNC", "RWF_DSYNC"])
def test_writes_that_must_be_durable_are(tmp_path: Path, raw: Path, image: Path, single: bool, native: bool) -> None:
    """Of these the kernel asks for no fsync, in a mount with a page cache neither."""
    with (
        mounted(image, raw),
        opened(raw, os.O_RDWR | os.O_DIRECT | (0 if single else os.O_DSYNC)) as fd,
        mmap.mmap(-1, PAGE) as page,
        system_calls(status(raw)["pid"], "fdatasync", tmp_path) as count,
    ):
        for turn in range(4):
            before = count()
            os.pwritev(fd, [page], turn * PAGE, os.RWF_DSYNC if single else 0)
            assert count() > before


@MODES
@pytest.mark.parametrize("over_file", [True, False], ids=["file", "directory"])
def test_a_time_of_change_follows(tmp_path: Path, image: Path, mode: Mode, over_file: bool) -> None:
    """The kernel is the master of it, with a page cache, and does not look at what is written past that."""
    point, raw = mountpoint(tmp_path, over_file=over_file)
    with mounted(*mode, image, point):
        with opened(raw, os.O_RDWR | os.O_DIRECT) as fd:
            for number in range(2):
                before = os.fstat(fd).st_mtime_ns
                time.sleep(TICK / 1e9)
                Direct(fd).write(number * CLUSTER, b"x" * PAGE)
                wait_until(lambda before=before: os.fstat(fd).st_mtime_ns > before)
            before = os.fstat(fd).st_mtime_ns
            time.sleep(TICK / 1e9)
            Direct(fd).write(0, b"y" * PAGE)
        assert raw.stat().st_mtime_ns > before
