"""What is done to the flat file, and what is measured."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import Header
from tests.bench import processor
from tests.bench.library import fragmented
from tests.bench.targets import Target, run

SIZE = 512 << 20


@dataclass(frozen=True)
class Context:
    """What rows share: the length of time-based rows, a raw file full of random bytes, a tree of files to copy."""

    seconds: float
    source: Path
    tree: Path


@dataclass(frozen=True)
class Requests:
    """What a fio job group has done: how many requests, and how many a second."""

    count: int
    iops: float


def parse_fio(said: str) -> Requests:
    """The sums of a job group. Raises RuntimeError if fio says that it failed."""
    job = json.loads(said[said.index("{") :])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio failed: {os.strerror(job['error'])}")
    reads, writes = job["read"], job["write"]
    return Requests(int(reads["total_ios"] + writes["total_ios"]), float(reads["iops"] + writes["iops"]))


def fio(path: Path, *options: str) -> Requests:
    """One fio job group (psync: one request at a time a job)."""
    out = run(
        "fio",
        "--name=row",
        f"--filename={path}",
        "--ioengine=psync",
        "--group_reporting",
        "--output-format=json",
        f"--size={SIZE}",
        "--randrepeat=0",
        "--allow_file_create=0",
        *options,
        timeout=300,
    )
    return parse_fio(out)


def lasting(context: Context) -> tuple[str, str]:
    """fio's options for a time-based row."""
    return "--time_based", f"--runtime={round(context.seconds * 1000)}ms"


def fill(target: Target, context: Context) -> None:
    """A fully allocated image, durably: else the host writes it out while it is measured."""
    target.fill(context.source)
    run("sync", target.image)


def on_full(*options: str) -> Callable[[Target, Context], float]:
    """Time-based fio on a fully allocated image."""

    def measure(target: Target, context: Context) -> float:
        fill(target, context)
        with served(target) as path:
            return fio(path, *lasting(context), *options).iops

    return measure


def on_fresh(requests: int, *options: str, backing: bool = False) -> Callable[[Target, Context], float]:
    """A fixed number of requests on an empty image; the time includes what fio syncs."""

    def measure(target: Target, context: Context) -> float:
        target.create(str(SIZE), context.source if backing else None)
        with served(target) as path:
            return fio(path, f"--number_ios={requests}", *options).iops

    return measure


def processor_time(*options: str) -> Callable[[Target, Context], float]:
    """Microseconds of the serving process's processor time for each request, on a fully allocated image."""

    def measure(target: Target, context: Context) -> float:
        fill(target, context)
        with served(target) as path:
            assert target.pid
            before = processor.used_by(target.pid)
            done = fio(path, *lasting(context), *options)
            return (processor.used_by(target.pid) - before) / done.count * 1e6

    return measure


class served:
    """Mount a target for a block; always unmounts."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __enter__(self) -> Path:
        return self._target.mount()

    def __exit__(self, *_: object) -> None:
        self._target.unmount()


def warm_reads(target: Target, context: Context) -> float:
    fill(target, context)
    with served(target) as path:
        run("dd", f"if={path}", "of=/dev/null", "bs=1M")
        return fio(path, "--rw=randread", "--bs=4k", "--invalidate=0", *lasting(context)).iops


def guest(target: Target, context: Context) -> float:
    """Seconds to make an ext4, loop-mount it, copy a tree into it and sync."""
    target.create(str(SIZE))
    with served(target) as path, tempfile.TemporaryDirectory() as mountpoint, ExitStack() as stack:
        started = time.monotonic()
        run("mkfs.ext4", "-q", "-F", path)
        run("mount", "-o", "loop", path, mountpoint)
        stack.callback(run, "umount", mountpoint)
        run("cp", "-a", context.tree, mountpoint)
        run("sync", "-f", mountpoint)
        return time.monotonic() - started


def mount_time(target: Target, context: Context) -> float:
    target.create(str(SIZE))
    started = time.monotonic()
    with served(target):
        return time.monotonic() - started


def syncs_per_1000(target: Target, context: Context) -> float:
    """fdatasync calls of the serving process per 1000 allocating writes with one fsync at the end, by strace."""
    target.create(str(SIZE), context.source)
    with served(target) as path, tempfile.NamedTemporaryFile() as trace:
        command = ["strace", "-f", "-qq", "-e", "trace=fdatasync,fsync", "-o", trace.name, "-p", str(target.pid)]
        tracer = subprocess.Popen(command)
        try:
            time.sleep(1)  # strace says nothing when it has attached
            fio(path, "--rw=randwrite", "--bs=4k", "--direct=1", "--number_ios=1000", "--end_fsync=1")
        finally:
            tracer.terminate()
            tracer.wait()
        calls = [line for line in Path(trace.name).read_text().splitlines() if "sync(" in line]
        return float(len(calls))


def mapped_terabyte(target: Target) -> None:
    """1 TiB, every cluster allocated, every one a hole of the host's: 128 MiB of tables and no data."""
    size = 1 << 40
    target.image.unlink(missing_ok=True)
    with target.image.open("wb") as disk:
        if target.image_format == "raw":
            disk.truncate(size)
            return
        geometry = Geometry()
        cluster, table = geometry.cluster_size, geometry.table_bytes
        tables = size // geometry.l2_coverage
        first_table = cluster + table
        first_data = first_table + tables * table
        header = Header(cluster, geometry.table_size, 1, 0, 0, 0, cluster, size)
        disk.write(header.encode())
        disk.seek(cluster)
        disk.write(array("Q", range(first_table, first_data, table)).tobytes())
        disk.seek(first_table)
        for start in range(first_data, first_data + size, geometry.l2_coverage):
            disk.write(array("Q", range(start, start + geometry.l2_coverage, cluster)).tobytes())
        disk.truncate(first_data + size)
        os.fsync(disk.fileno())


def resident_memory(target: Target, context: Context) -> float:
    """Resident MiB of the serving process after random reads all over 1 TiB."""
    mapped_terabyte(target)
    with served(target) as path:
        fio(path, "--rw=randread", "--bs=4k", "--direct=1", "--size=1T", "--number_ios=20000")
        status = Path(f"/proc/{target.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


def cold_reads(target: Target, context: Context) -> float:
    mapped_terabyte(target)
    run("sync")
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    with served(target) as path:
        return fio(path, "--rw=randread", "--bs=4k", "--direct=1", "--size=1T", "--number_ios=2000").iops


def need_holes(path: Path) -> None:
    """Raises RuntimeError unless a hole reads as zeroes: a loop device hides that it cannot be made, QEMU 7.2 lies."""
    with path.open("r+b") as disk:
        disk.write(b"data" * 16384)
        os.fsync(disk.fileno())
    try:
        run("fallocate", "--punch-hole", "--offset", "0", "--length", "65536", path)
    except RuntimeError as error:
        raise RuntimeError("makes no holes") from error
    with path.open("rb") as disk:
        if any(disk.read(65536)):
            raise RuntimeError("says that it has made a hole, and has not")


def discard_terabyte(target: Target, context: Context) -> float:
    """Seconds that `blkdiscard` takes for 1 TiB, every cluster of it allocated, and a sync."""
    mapped_terabyte(target)
    with served(target) as path, ExitStack() as stack:
        need_holes(path)
        device = run("losetup", "--find", "--show", path).strip()
        stack.callback(run, "losetup", "--detach", device)
        started = time.monotonic()
        run("blkdiscard", "-f", device)
        run("sync", path)
        return time.monotonic() - started


def trim(target: Target, context: Context) -> float:
    """Seconds that `fstrim` takes, and a sync, for a guest's file system in which 20,000 files were deleted."""
    target.create(str(SIZE))
    with served(target) as path, tempfile.TemporaryDirectory() as mountpoint, ExitStack() as stack:
        need_holes(path)
        run("mkfs.ext4", "-q", "-F", path)
        run("mount", "-o", "loop,nodiscard", path, mountpoint)
        stack.callback(run, "umount", mountpoint)
        content = random.randbytes(16 << 10)
        files = [Path(mountpoint, str(number)) for number in range(20_000)]
        for file in files:
            file.write_bytes(content)
        run("sync", "-f", mountpoint)
        for file in files:
            file.unlink()
        run("sync", "-f", mountpoint)
        started = time.monotonic()
        run("fstrim", mountpoint)
        run("sync", path)
        return time.monotonic() - started


def write_discarded(target: Target, context: Context) -> float:
    """Small writes all over a disk that was full, and all of whose data was discarded."""
    fill(target, context)
    with served(target) as path:
        need_holes(path)
        run("fallocate", "--punch-hole", "--offset", "0", "--length", str(SIZE), path)
        run("sync", path)
        return fio(path, "--rw=randwrite", "--bs=4k", "--number_ios=20000", "--end_fsync=1").iops


def in_program(figure: str) -> Callable[[Target, Context], float]:
    """A figure of a program that discards a million clusters that lie scattered in the file."""

    def measure(target: Target, context: Context) -> float:
        fragmented(target.image)
        return float(run(sys.executable, "-m", "tests.bench.library", figure, target.image))

    return measure
