"""The native fast path on real mounts: that it answers, that it answers right, and what it leaves to Python.

What must hold with or without it runs in three modes: "on", "off" (pure Python), and "pass" (the filter is loaded, but
lets every request through).
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest

from qedfuse.qed.header import HEADER_BYTES, Header
from qedfuse.qed.table_pages import PageMap, PagePool
from tests.helpers.images.chains import check_is_clean
from tests.helpers.images.host_holes import segments
from tests.helpers.mounts.fastpath_modes import (
    CLUSTER,
    MODES_ARE_CHOSEN_HERE,
    flat,
    mode,
    run_fallocate,
    words,
)
from tests.helpers.mounts.guests import filesystem, loop_device, need_guest, run
from tests.helpers.mounts.mounts import counters, mounted, need_fuse, opened, status
from tests.helpers.mounts.system_calls import system_calls
from tests.helpers.qemu.cli import ROOT, environment, new_image, qemu_io

KIB = 1 << 10
MIB = 1 << 20

__all__ = ["mode"]  # a fixture

pytestmark = MODES_ARE_CHOSEN_HERE


def need(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")


# -- the three modes --------------------------------------------------------------------------------------------------


def test_status_tells_who_answers(tmp_path: Path, raw: Path, mode: str) -> None:
    image = new_image(tmp_path / "disk.qed", "4M")
    with mounted(image, raw, *words(mode), "-o", "direct_io"):
        with opened(raw) as fd:
            for _ in range(2):  # the first write allocates
                os.pwrite(fd, b"x" * 4096, 0)
                assert os.pread(fd, 4096, 0) == b"x" * 4096
        found = status(raw)
        assert found["fastpath"] is (mode == "on")
        assert (found["requests"]["read"], found["requests"]["write"]) == (2, 2)
        native = found["fastpath-counters"]
        if mode == "off":
            assert native == {}
        else:
            assert native["calls"] > 0
            assert (native["reads"], native["writes"]) == ((2, 1) if mode == "on" else (0, 0))


@pytest.mark.parametrize("options", [(), ("-o", "direct_io")], ids=["cached", "direct_io"])
@pytest.mark.parametrize("overlay", [False, True], ids=["plain", "overlay"])
def test_parallel_asynchronous_writers_read_what_they_wrote(
    tmp_path: Path, raw: Path, mode: str, overlay: bool, options: tuple[str, ...]
) -> None:
    need("fio")
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(24 * MIB + 100))
    below = ("-b", base, "-F", "raw") if overlay else ()
    image = new_image(tmp_path / "disk.qed", "48M", *below)
    with mounted(image, raw, *words(mode), *options):
        common = ["--ioengine=libaio", "--iodepth=8", "--direct=1", f"--filename={raw}", "--randseed=7", "--minimal"]
        common += ["--numjobs=2", "--size=24M", "--offset_increment=24M", "--verify=crc32c", "--verify_fatal=1"]
        for seed in (1, 2):  # allocating, then in place
            run(
                "fio",
                "--name=x",
                "--rw=randwrite",
                "--bsrange=512-96k",
                "--bs_unaligned",
                "--verify_state_save=0",
                f"--randseed={seed}",
                *common,
            )
        if mode == "on":
            assert counters(raw)["reads"] > 100
            assert counters(raw)["writes"] > 100
        ours = raw.read_bytes()
    assert ours == flat(image)
    run("qemu-img", "check", image)


def test_random_reads_through_a_chain(tmp_path: Path, raw: Path, mode: str) -> None:
    """Three images over a raw file that ends in the middle of a sector, all of different sizes and geometries."""
    rnd = random.Random(3)
    base = tmp_path / "base.raw"
    base.write_bytes(rnd.randbytes(3 * MIB + 77))
    below, kind = base, "raw"
    for level, (size, cluster, table) in enumerate([("5M", 4096, 2), ("9M", 16384, 2), ("8M", 65536, 4)]):
        image = new_image(
            tmp_path / f"{level}.qed", size, "-o", f"cluster_size={cluster},table_size={table}", "-b", below, "-F", kind
        )
        limit = int(size[:-1]) * MIB
        for _ in range(30):
            start = rnd.randrange(0, limit - 40_000) & -512
            action = rnd.choice(["write -z", f"write -P {rnd.randrange(1, 255)}"])
            qemu_io(image, f"{action} {start} {rnd.randrange(512, 40_000) & -512}")
        below, kind = image, "qed"
    expected = flat(image)
    with mounted(image, raw, *words(mode), "--ro", "-o", "direct_io"):
        assert raw.read_bytes() == expected
        before = counters(raw)
        with opened(raw, os.O_RDONLY) as fd:
            for _ in range(400):
                offset, size_ = rnd.randrange(len(expected)), rnd.choice([1, 513, 4096, 70_000, 1 << 20])
                assert os.pread(fd, size_, offset) == expected[offset : offset + size_]
        if mode == "on":
            after = counters(raw)
            assert after["reads"] - before["reads"] >= 400  # the kernel splits the largest
            assert after["passed"] - before["passed"] < 10


def test_random_writes_in_place(tmp_path: Path, raw: Path, mode: str) -> None:
    """Runs of clusters in and out of order, pieces of sectors, and zeroes that must not be skipped."""
    rnd = random.Random(4)
    image = new_image(tmp_path / "disk.qed", "4M", "-o", "cluster_size=4096")
    order = list(range(0, 1024, 4))
    rnd.shuffle(order)
    for cluster in order:
        qemu_io(image, f"write -P 1 {cluster * 4096} {rnd.randrange(1, 5) * 4096}")
    expected = bytearray(flat(image))
    with mounted(image, raw, *words(mode), "-o", "direct_io"):
        with opened(raw) as fd:
            for _ in range(400):
                size = rnd.choice([1, 512, 4096, 5000, 100_000])
                offset = rnd.randrange(len(expected) - size)
                data = rnd.choice([rnd.randbytes(size), bytes(size)])
                assert os.pwrite(fd, data, offset) == size
                expected[offset : offset + size] = data
        assert raw.read_bytes() == expected
        if mode == "on":
            assert counters(raw)["writes"] > 100
    assert flat(image) == expected
    run("qemu-img", "check", image)


#: Cluster -> an entry that no image may have there: past the end of the file (by far, by a little, by an overflow),
#: not on a cluster boundary, inside the header.
CORRUPT = {
    1: 1 << 40,
    3: 40 * CLUSTER,
    5: 2**64 - CLUSTER,
    7: 512,
    9: 7 * CLUSTER + 512,
    11: 4096,
}


@pytest.mark.parametrize("access", ["ro", "rw"])
def test_a_corrupt_entry_is_an_io_error(tmp_path: Path, raw: Path, mode: str, access: str) -> None:
    """The clusters next to it are fine."""
    image = new_image(tmp_path / "disk.qed", "2M")
    qemu_io(image, "write -P 7 0 1M")
    assert image.stat().st_size < 40 * CLUSTER
    with image.open("r+b") as file:
        header = Header.decode(file.read(HEADER_BYTES), str(image))
        file.seek(header.l1_table_offset)
        (table,) = struct.unpack("<Q", file.read(8))
        for cluster, entry in CORRUPT.items():
            file.seek(table + cluster * 8)
            file.write(struct.pack("<Q", entry))
    more, flags = (["--ro"], os.O_RDONLY) if access == "ro" else ([], os.O_RDWR)
    with mounted(image, raw, *words(mode), "-o", "direct_io", *more), opened(raw, flags) as fd:
        for _ in range(2):
            for cluster in CORRUPT:
                start = cluster * CLUSTER
                assert os.pread(fd, CLUSTER, start - CLUSTER) == b"\7" * CLUSTER
                for offset, size in ((start, 512), (start + CLUSTER - 1, 1), (start - 1, 2), (0, MIB)):
                    with pytest.raises(OSError, match="Input/output error"):
                        os.pread(fd, size, offset)
                if access == "rw":
                    with pytest.raises(OSError, match="Input/output error"):
                        os.pwrite(fd, b"x" * 1024, start)
                    os.pwrite(fd, b"\7" * 1024, start - CLUSTER)


def test_a_failed_write_reaches_the_caller_as_it_is(tmp_path: Path, raw: Path, mode: str) -> None:
    """A limit on the size of files makes the host refuse what lies behind it, in place or not."""
    image = new_image(tmp_path / "disk.qed", "4M")
    qemu_io(image, "write -P 7 0 2M")
    with mounted(image, raw, *words(mode), "-o", "direct_io"), opened(raw) as fd:
        assert os.pwrite(fd, b"x" * 4096, 0) == 4096
        resource.prlimit(status(raw)["pid"], resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
        for _ in range(2):
            with pytest.raises(OSError, match="File too large"):
                os.pwrite(fd, b"y" * 4096, MIB + 8192)
        assert os.pread(fd, 4096, MIB + 8192) == b"\7" * 4096
        assert os.pwrite(fd, b"z" * 4096, 4096) == 4096
        resource.prlimit(status(raw)["pid"], resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert os.pwrite(fd, b"y" * 4096, MIB + 8192) == 4096
        os.fsync(fd)
        assert os.pread(fd, 4096, MIB + 8192) == b"y" * 4096


def test_what_is_not_in_the_page_cache_is_read_all_the_same(tmp_path: Path, raw: Path, mode: str) -> None:
    image = new_image(tmp_path / "disk.qed", "32M")
    content = random.Random(5).randbytes(32 * MIB)
    with mounted(image, raw, *words(mode), "-o", "direct_io"):
        raw_fd = os.open(raw, os.O_RDWR)
        with os.fdopen(raw_fd, "r+b", buffering=0) as file:
            for start in range(0, len(content), MIB):
                file.write(content[start : start + MIB])
            os.fsync(raw_fd)
            before = counters(raw)
            with image.open("rb") as host:
                os.posix_fadvise(host.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            rnd = random.Random(6)
            for _ in range(100):
                offset = rnd.randrange(len(content))
                assert os.pread(raw_fd, 5000, offset) == content[offset : offset + 5000]
            if mode == "on":
                after = counters(raw)
                assert after["missed"] + after["waits"] > before["missed"] + before["waits"]


# -- durability -------------------------------------------------------------------------------------------------------


def test_a_write_in_place_makes_the_next_fsync_a_real_one(tmp_path: Path, raw: Path, mode: str) -> None:
    image = new_image(tmp_path / "disk.qed", "4M")
    qemu_io(image, "write -P 7 0 2M")
    with mounted(image, raw, *words(mode), "-o", "direct_io"), opened(raw) as fd:
        os.fsync(fd)
        with system_calls(status(raw)["pid"], "fdatasync", tmp_path) as count:
            for turn in range(1, 6):
                os.pwrite(fd, b"x" * 4096, turn * 8192)
                os.fsync(fd)
                os.fsync(fd)  # nothing to do
                assert count() == turn
        if mode == "on":
            assert counters(raw)["writes"] == 5


@pytest.mark.parametrize("flag", ["O_SYNC", "O_DSYNC"])
def test_writes_that_must_be_synced_are(tmp_path: Path, raw: Path, mode: str, flag: str) -> None:
    image = new_image(tmp_path / "disk.qed", "4M")
    qemu_io(image, "write -P 7 0 2M")
    with (
        mounted(image, raw, *words(mode), "-o", "direct_io"),
        opened(raw, os.O_RDWR | getattr(os, flag)) as fd,
        system_calls(status(raw)["pid"], "fdatasync", tmp_path) as count,
    ):
        for turn in range(1, 6):
            os.pwrite(fd, b"x" * 4096, turn * 8192)
            assert count() == turn


@pytest.mark.parametrize("flag", ["RWF_SYNC", "RWF_DSYNC"])
def test_single_writes_that_must_be_synced_are(tmp_path: Path, raw: Path, flag: str) -> None:
    """Without a page cache only the request says so, in place and in new clusters, whatever its size."""
    image = new_image(tmp_path / "disk.qed", "8M")
    qemu_io(image, "write -P 7 0 2M")
    with (
        mounted(image, raw, "-o", "direct_io"),
        opened(raw) as fd,
        system_calls(status(raw)["pid"], "fdatasync", tmp_path) as count,
    ):
        os.pwrite(fd, b"x" * 4096, MIB)
        assert count() == 0
        before = 0
        for turn in range(1, 6):
            os.pwritev(fd, [b"x" * 4096 * turn], turn * 8192, getattr(os, flag))
            assert count() > before
            before = count()
        for turn in range(6, 9):
            os.pwritev(fd, [b"x" * 300_000], (turn - 4) * MIB, getattr(os, flag))
            assert count() > before
            before = count()


def test_a_mount_that_is_always_synced(tmp_path: Path, raw: Path, mode: str) -> None:
    image = new_image(tmp_path / "disk.qed", "4M")
    qemu_io(image, "write -P 7 0 2M")
    with (
        mounted(image, raw, *words(mode), "-o", "sync,direct_io"),
        opened(raw) as fd,
        system_calls(status(raw)["pid"], "fdatasync", tmp_path) as count,
    ):
        for turn in range(1, 4):
            os.pwrite(fd, b"x" * 4096, turn * 8192)
            assert count() == turn


# -- fallocate, lseek -------------------------------------------------------------------------------------------------


def blocks(path: Path) -> int:
    """Bytes that a file takes."""
    return path.stat().st_blocks * 512


def settle(raw: Path, image: Path, below: int) -> None:
    """Until the host has its space back."""
    with opened(raw) as fd:
        os.fsync(fd)
    deadline = time.monotonic() + 20
    while blocks(image) >= below:
        assert time.monotonic() < deadline, f"{blocks(image)} bytes in use, {below} expected"
        time.sleep(0.05)


def test_fallocate_tool(tmp_path: Path, raw: Path) -> None:
    need("fallocate")
    image = new_image(tmp_path / "disk.qed", "16M")
    with mounted(image, raw):
        raw_fd = os.open(raw, os.O_RDWR)
        os.pwrite(raw_fd, b"x" * 16 * MIB, 0)
        os.fsync(raw_fd)
        full = blocks(image)
        run("fallocate", "--punch-hole", "-o", str(4 * MIB), "-l", str(4 * MIB), raw)
        run("fallocate", "--zero-range", "-o", str(10 * MIB + 100), "-l", str(2 * MIB), raw)
        settle(raw, image, full - 5 * MIB)
        expected = bytearray(b"x" * 16 * MIB)
        expected[4 * MIB : 8 * MIB] = bytes(4 * MIB)
        expected[10 * MIB + 100 : 12 * MIB + 100] = bytes(2 * MIB)
        assert raw.read_bytes() == expected
        run("fallocate", "--keep-size", "-o", str(15 * MIB), "-l", str(4 * MIB), raw)
        assert raw.stat().st_size == 16 * MIB
        run("fallocate", "-o", str(16 * MIB), "-l", str(4 * MIB), raw)
        run("fallocate", "--zero-range", "-o", str(19 * MIB), "-l", str(4 * MIB), raw)
        assert raw.stat().st_size == 23 * MIB
        failed = subprocess.run(
            ["fallocate", "--collapse-range", "-l", "1M", str(raw)], capture_output=True, check=False
        )
        assert b"not supported" in failed.stderr
        os.close(raw_fd)
        found = counters(raw)
        assert found["handed"] - found["syncs"] - found["opens"] == 5
    assert flat(image) == expected + bytes(7 * MIB)
    check_is_clean(image)


def test_errors_of_fallocate_reach_the_caller(tmp_path: Path, raw: Path) -> None:
    image = new_image(tmp_path / "disk.qed", "16M")
    with mounted(image, raw, "-o", "fixed_size"), opened(raw) as fd:
        with pytest.raises(OSError, match="not permitted"):
            os.posix_fallocate(fd, 16 * MIB, MIB)
        with pytest.raises(OSError, match="No space"):
            run_fallocate(fd, 0, 0, 1 << 50)
        run_fallocate(fd, 1, 0, MIB)
        assert os.fstat(fd).st_size == 16 * MIB


@pytest.mark.parametrize("options", [(), ("-o", "direct_io")], ids=["cached", "direct_io"])
def test_lseek_sees_what_was_just_written(tmp_path: Path, raw: Path, options: tuple[str, ...]) -> None:
    """Also what only the kernel has: with the writeback cache nobody has told us of it."""
    image = new_image(tmp_path / "disk.qed", "64M")
    with mounted(image, raw, *options), opened(raw) as fd:
        assert segments(fd) == []
        os.pwrite(fd, b"x" * CLUSTER, 8 * MIB)
        assert segments(fd) == [(8 * MIB, 8 * MIB + CLUSTER)]
        os.pwrite(fd, b"x" * CLUSTER, 8 * MIB + CLUSTER)
        assert segments(fd) == [(8 * MIB, 8 * MIB + 2 * CLUSTER)]
        os.pwrite(fd, b"x" * (CLUSTER - 300), 40 * MIB + 300)
        assert segments(fd) == [(8 * MIB, 8 * MIB + 2 * CLUSTER), (40 * MIB, 40 * MIB + CLUSTER)]
        os.pwrite(fd, b"x" * CLUSTER, 64 * MIB - CLUSTER)
        assert os.lseek(fd, 50 * MIB, os.SEEK_DATA) == 64 * MIB - CLUSTER
        assert os.lseek(fd, 64 * MIB - CLUSTER, os.SEEK_HOLE) == 64 * MIB
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(fd, 64 * MIB, os.SEEK_DATA)
        os.pwrite(fd, b"y" * 100, 70 * MIB)  # past the end: grows
        assert os.lseek(fd, 64 * MIB, os.SEEK_DATA) == 70 * MIB
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0


def test_lseek_of_a_file_that_nobody_can_write_asks_the_kernel_for_nothing(tmp_path: Path, raw: Path) -> None:
    """Each time it does takes a thread and the kernel's walk over its cache; QEMU makes thousands of lseeks."""
    image = new_image(tmp_path / "disk.qed", "64M")
    with mounted(image, raw):
        with opened(raw) as fd:
            os.pwrite(fd, b"x" * 100, 8 * MIB)
        with opened(raw, os.O_RDONLY) as fd, system_calls(status(raw)["pid"], "write", tmp_path) as count:
            for _ in range(20):
                assert os.lseek(fd, 0, os.SEEK_DATA) == 8 * MIB
            assert count() < 30  # the replies
            with opened(raw) as writer:
                os.pwrite(writer, b"x", 4 * MIB)
                assert os.lseek(fd, 0, os.SEEK_DATA) == 4 * MIB
            os.truncate(raw, 4 * MIB)
            with pytest.raises(OSError, match="No such device or address"):
                os.lseek(fd, 0, os.SEEK_DATA)


def test_lseek_through_a_chain_and_in_a_read_only_mount(tmp_path: Path, raw: Path) -> None:
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(3 * MIB)
        file.write(b"x" * 4096)
    image = new_image(tmp_path / "disk.qed", "16M", "-b", base, "-F", "raw")
    qemu_io(image, "write -P 7 12M 64k")
    with mounted(image, raw, "--ro"), opened(raw, os.O_RDONLY) as fd:
        assert segments(fd) == [(3 * MIB, 3 * MIB + 4096), (12 * MIB, 12 * MIB + CLUSTER)]


def test_64_tib_are_scanned_in_no_time(tmp_path: Path, raw: Path) -> None:
    image = new_image(tmp_path / "disk.qed", "64T")
    with mounted(image, raw), opened(raw) as fd:
        position = (63 << 40) + 12345
        os.pwrite(fd, b"x" * CLUSTER, position // CLUSTER * CLUSTER)
        begin = time.perf_counter()
        start = position // CLUSTER * CLUSTER
        assert segments(fd) == [(start, start + CLUSTER)]
        assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("tool", ["cp", "tar", "rsync", "qemu-img"])
def test_tools_keep_holes(tmp_path: Path, raw: Path, tool: str) -> None:
    need(tool)
    image = new_image(tmp_path / "disk.qed", "1G")
    copy = tmp_path / "copy"
    copy.mkdir()
    with mounted(image, raw):
        with opened(raw) as fd:
            os.pwrite(fd, b"x" * 3 * MIB, 100 * MIB)
            os.pwrite(fd, b"y" * 5000, 900 * MIB + 1)
            os.pwrite(fd, b"z", (1 << 30) - 1)
            begin = time.perf_counter()
            if tool == "cp":
                run("cp", "--sparse=auto", raw, copy / raw.name)
            elif tool == "tar":
                run("tar", "-C", raw.parent, "--sparse", "-cf", copy / "x.tar", raw.name)
                assert (copy / "x.tar").stat().st_size < 8 * MIB
                run("tar", "-C", copy, "-xf", copy / "x.tar")
            elif tool == "rsync":
                run("rsync", "--sparse", raw, copy / raw.name)
            else:
                run("qemu-img", "convert", "-f", "raw", "-O", "raw", raw, copy / raw.name)
            elapsed = time.perf_counter() - begin
        with (copy / raw.name).open("rb") as file:
            for offset, data in ((100 * MIB, b"x" * 3 * MIB), (900 * MIB + 1, b"y" * 5000), ((1 << 30) - 1, b"z")):
                file.seek(offset)
                assert file.read(len(data)) == data
        run("cmp", raw, copy / raw.name)
    assert (copy / raw.name).stat().st_size == 1 << 30
    assert blocks(copy / raw.name) < 8 * MIB
    assert tool == "rsync" or elapsed < 5  # rsync reads everything


# -- TRIM -------------------------------------------------------------------------------------------------------------


@pytest.mark.guest
def test_a_loop_device_offers_discard_and_fstrim_shrinks_the_image(tmp_path: Path, raw: Path) -> None:
    need_guest("mkfs.ext4", "fstrim")
    image = new_image(tmp_path / "disk.qed", "256M")
    with mounted(image, raw), loop_device(raw) as device:
        assert int(Path("/sys/block", device.name, "queue/discard_max_bytes").read_text()) > 0
        run("mkfs.ext4", "-q", "-F", device)
        with filesystem(device, tmp_path / "guest") as guest:
            (guest / "keep").write_bytes(b"k" * MIB)
            (guest / "big").write_bytes(random.Random(1).randbytes(64 * MIB))
            os.sync()
            full = blocks(image)
            assert full > 64 * MIB
            (guest / "big").unlink()
            os.sync()
            run("fstrim", guest)
            settle(raw, image, full - 60 * MIB)
            (guest / "again").write_bytes(random.Random(2).randbytes(32 * MIB))
        size = image.stat().st_size
        with filesystem(device, guest):
            assert (guest / "keep").read_bytes() == b"k" * MIB
            assert (guest / "again").read_bytes() == random.Random(2).randbytes(32 * MIB)
    assert image.stat().st_size <= size
    check_is_clean(image)


@pytest.mark.guest
def test_mount_with_discard(tmp_path: Path, raw: Path) -> None:
    need_guest("mkfs.ext4")
    image = new_image(tmp_path / "disk.qed", "256M")
    with mounted(image, raw), loop_device(raw) as device:
        run("mkfs.ext4", "-q", "-F", device)
        with filesystem(device, tmp_path / "guest", "-o", "discard") as guest:
            (guest / "big").write_bytes(random.Random(1).randbytes(64 * MIB))
            os.sync()
            full = blocks(image)
            (guest / "big").unlink()
            os.sync()
            settle(raw, image, full - 60 * MIB)


@pytest.mark.guest
@pytest.mark.parametrize("option", [[], ["-z"]], ids=["discard", "zeroout"])
def test_blkdiscard(tmp_path: Path, raw: Path, option: list[str]) -> None:
    need_guest("blkdiscard")
    image = new_image(tmp_path / "disk.qed", "64M")
    with mounted(image, raw), loop_device(raw) as device:
        with opened(device) as fd:
            os.write(fd, b"x" * 64 * MIB)
            os.fsync(fd)
        full = blocks(image)
        run("blkdiscard", *option, "-f", "-o", str(16 * MIB), "-l", str(32 * MIB), device)
        settle(raw, image, full - 31 * MIB)
        expected = b"x" * 16 * MIB + bytes(32 * MIB) + b"x" * 16 * MIB
        with opened(device, os.O_RDONLY) as fd:
            fcntl.ioctl(fd, 0x1261)  # BLKFLSBUF
        assert device.read_bytes() == expected
        run("blkdiscard", *option, "-f", device)
        settle(raw, image, 2 * MIB)
    assert flat(image) == bytes(64 * MIB)


# -- fairness, idleness -----------------------------------------------------------------------------------------------

#: Runs the command line in a process whose event loop has one task more: it measures how late it is woken up.
WATCHED = """
import sys, time
if "--no-fastpath" not in sys.argv:
    import qedfuse.fuse.fastpath
import trio
import qedfuse.daemon.daemon
from qedfuse.cli.main import main

serve_kernel = qedfuse.daemon.daemon.Daemon._serve_kernel

async def heartbeat(path):
    with open(path, "w", buffering=1) as log:
        while True:
            begin = time.perf_counter()
            await trio.sleep(0.005)
            print(time.perf_counter() - begin - 0.005, file=log)

async def watched(self):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heartbeat, PATH)
        await serve_kernel(self)
        nursery.cancel_scope.cancel()

PATH = sys.argv.pop(1)
qedfuse.daemon.daemon.Daemon._serve_kernel = watched
sys.exit(main())
"""


def test_other_tasks_have_their_turn_under_a_flood_of_reads(tmp_path: Path, raw: Path) -> None:
    need_fuse()
    image = new_image(tmp_path / "disk.qed", "16M")
    qemu_io(image, "write -P 7 0 8M", "write -P 7 8M 8M")
    delays = tmp_path / "delays"
    command = [sys.executable, "-c", WATCHED, str(delays), "mount", "-o", "direct_io", str(image), str(raw)]
    run_plain(command)
    try:
        stop = threading.Event()
        threads = [threading.Thread(target=read_on_and_on, args=(raw, stop)) for _ in range(4)]
        before = counters(raw)["reads"]
        for thread in threads:
            thread.start()
        writes = 0
        with opened(raw) as fd:
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                os.pwrite(fd, b"x", 0)
                os.fsync(fd)  # Python's, in a thread
                writes += 1
        stop.set()
        for thread in threads:
            thread.join()
        answered = counters(raw)["reads"] - before
    finally:
        subprocess.run(["fusermount3", "-u", str(raw)], check=True)
    measured = sorted(float(line) for line in delays.read_text().splitlines()[-200:])
    print(f"figures: {answered} reads; delay: median {statistics.median(measured):.4f} s, worst {measured[-1]:.4f} s")
    assert answered > 3000
    assert writes > 20
    assert statistics.median(measured) < 0.01
    assert measured[int(len(measured) * 0.95)] < 0.1


def run_plain(command: list[str]) -> None:
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def read_on_and_on(path: Path, stop: threading.Event) -> None:
    rnd = random.Random()
    with opened(path, os.O_RDONLY) as fd:
        while not stop.is_set():
            os.pread(fd, 4096, rnd.randrange(4096) * 4096)


def cpu_time(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_mount_does_not_spin(tmp_path: Path, raw: Path) -> None:
    image = new_image(tmp_path / "disk.qed", "16M")
    qemu_io(image, "write -P 7 0 8M")
    with mounted(image, raw, "-o", "direct_io"), opened(raw) as fd:
        for _ in range(2000):
            os.pread(fd, 4096, 0)
        spins = counters(raw)["spins"]
        used = cpu_time(status(raw)["pid"])
        time.sleep(1)
        assert counters(raw)["spins"] <= spins + 1
        assert cpu_time(status(raw)["pid"]) - used < 0.1
        before = counters(raw)
        for _ in range(100):  # slower than spinning could catch
            time.sleep(0.002)
            os.pread(fd, 4096, 0)
        after = counters(raw)
        assert after["reads"] - before["reads"] == 100
        assert after["spins"] - before["spins"] < 30


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("pyfuse3", id="pyfuse3 is there first, so the linker has bound it to libfuse"),
        pytest.param(
            "qedfuse.fuse.fastpath, pyfuse3; pyfuse3.__file__ = '/nowhere'", id="bound, but libfuse is not to be found"
        ),
    ],
)
def test_where_it_cannot_bind_python_answers_and_the_log_says_so(tmp_path: Path, raw: Path, first: str) -> None:
    need_fuse()
    image = new_image(tmp_path / "disk.qed", "4M")
    log = tmp_path / "log"
    program = f"import {first}; import sys; from qedfuse.cli.main import main; sys.exit(main())"
    run_plain([sys.executable, "-c", program, "mount", "--log-file", str(log), str(image), str(raw)])
    try:
        found = status(raw)
        assert found["fastpath"] is False
        raw.write_bytes(b"x" * 4096)
        assert raw.read_bytes() == b"x" * 4096
    finally:
        subprocess.run(["fusermount3", "-u", str(raw)], check=True)
    assert "no native fast path" in log.read_text()


def test_without_memory_for_a_request_it_says_so() -> None:
    """And not that libfuse was not found."""
    program = """if True:
        import resource
        from qedfuse.fuse.fastpath import native
        import pyfuse3
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 20), resource.RLIM_INFINITY))
        try:
            native.bind(pyfuse3.__file__)
        except OSError as error:
            print(error.errno)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        native.bind(pyfuse3.__file__)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == f"{errno.ENOMEM}\n"


def test_the_filter_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    need(compiler)
    strict = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wshadow", "-Werror"]
    include = sysconfig.get_path("include")
    sources = [*(ROOT / "qedfuse" / "native" / "fastpath").glob("*.c")]
    assert sources
    run(compiler, *strict, f"-I{include}", *sources, "-o", tmp_path / "x.so")


def test_the_index_of_pages_keeps_up_with_them() -> None:
    """Against a set, with few places and long chains of neighbours: what is dropped leaves no gap in a search."""
    from qedfuse.native import _fastpath

    rnd = random.Random(1)
    pool = PagePool(capacity=100_000)
    level = PageMap(pool)
    for _ in range(20):
        level.insert(rnd.randrange(1 << 40), 0, None)
    index = _fastpath.PageIndex()
    level.watch(index)
    for _ in range(20_000):
        number = rnd.choice([rnd.randrange(300), rnd.randrange(1 << 40)])
        if number in level.pages:
            level.drop(number)
        elif rnd.random() < 0.5:
            level.insert(number, 0, None)
        elif level.pages and rnd.random() < 0.8:
            level.drop(rnd.choice(list(level.pages)))
        probe = rnd.randrange(300)
        assert (probe in index) is (probe in level.pages)
        assert len(index) == len(level.pages)
    assert all(number in index for number in level.pages)
    level.clear()
    assert len(index) == 0
    assert 5 not in index


@pytest.mark.parametrize("page", [b"x", bytes(4097)])
def test_only_pages_are_indexed(page: bytes) -> None:
    from qedfuse.native import _fastpath

    with pytest.raises(ValueError, match="not a table page"):
        _fastpath.PageIndex().insert(1, memoryview(page))
