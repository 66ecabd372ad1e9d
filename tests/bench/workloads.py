"""The rows of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.measures import (
    Context,
    cold_reads,
    discard_terabyte,
    guest,
    in_program,
    info_time,
    mount_time,
    on_fresh,
    on_full,
    resident_memory,
    syncs_per_1000,
    trim,
    warm_reads,
    write_discarded,
)
from tests.bench.targets import NbdFuse, QedFusePython, RawFile, StorageDaemon, Target


@dataclass(frozen=True)
class Row:
    """`measure` gets a fresh target, returns a figure. `bar`: the ratio to the peer that we promise (0: no ratio).
    `raw_bar`: the same to the raw file. `limit`: the largest figure that we allow ourselves (0: any)."""

    title: str
    unit: str
    measure: Callable[[Target, Context], float]
    higher_is_better: bool = True
    bar: float = 1.0
    raw_bar: float = 0.0
    limit: float = 0.0
    skip: tuple[type[Target], ...] = ()


DIRECT = "--direct=1"
#: What makes no holes: QEMU's export (7.2 says that it has, and has not), nbdfuse, and pyfuse3 by itself.
NO_HOLES = (StorageDaemon, NbdFuse, QedFusePython)
ROWS: tuple[Row, ...] = (
    Row("random read 4k direct, 1 reader", "IOPS", on_full("--rw=randread", "--bs=4k", DIRECT), bar=2),
    Row("random read 4k direct, 8 readers", "IOPS", on_full("--rw=randread", "--bs=4k", DIRECT, "--numjobs=8"), bar=2),
    Row("random write 4k direct in place, 1 writer", "IOPS", on_full("--rw=randwrite", "--bs=4k", DIRECT), bar=2),
    Row(
        "random write 4k direct in place, 8 writers",
        "IOPS",
        on_full("--rw=randwrite", "--bs=4k", DIRECT, "--numjobs=8"),
        bar=2,
    ),
    Row("sequential read 1 MiB direct", "MiB/s", on_full("--rw=read", "--bs=1M", DIRECT), bar=1.2),
    Row("sequential write 1 MiB direct", "MiB/s", on_full("--rw=write", "--bs=1M", DIRECT), bar=1.2),
    Row("buffered random read 4k, warm", "IOPS", warm_reads, raw_bar=0.9),
    Row("buffered random write 4k + fsync", "IOPS", on_full("--rw=randwrite", "--bs=4k", "--end_fsync=1"), raw_bar=0.9),
    Row(
        "allocating random write 4k direct",
        "IOPS",
        on_fresh(6000, "--rw=randwrite", "--bs=4k", DIRECT),
        bar=1.5,
    ),
    Row(
        "allocating sequential write 1 MiB + fsync",
        "MiB/s",
        on_fresh(512, "--rw=write", "--bs=1M", "--end_fsync=1"),
    ),
    Row(
        "allocating 4k, fsync each",
        "IOPS",
        on_fresh(1500, "--rw=randwrite", "--bs=4k", "--fsync=1"),
    ),
    Row(
        "copy-on-write random write 4k, raw backing",
        "IOPS",
        on_fresh(4000, "--rw=randwrite", "--bs=4k", DIRECT, backing=True),
        bar=3,
    ),
    Row("guest: mkfs.ext4, loop mount, copy a tree, sync", "s", guest, higher_is_better=False, raw_bar=0.9),
    Row("mount until usable", "s", mount_time, higher_is_better=False, bar=0, skip=(RawFile,)),
    Row("info", "s", info_time, higher_is_better=False, bar=0, skip=(RawFile, NbdFuse, QedFusePython)),
    Row(
        "resident memory, random reads over 1 TiB",
        "MiB",
        resident_memory,
        higher_is_better=False,
        bar=0,
        skip=(RawFile,),
    ),
    Row(
        "sync calls per 1000 copy-on-write writes",
        "calls",
        syncs_per_1000,
        higher_is_better=False,
        bar=0,
        skip=(RawFile, NbdFuse),  # that one's are qemu-nbd's
    ),
    Row("cold random read 4k of a 1 TiB image", "IOPS", cold_reads, skip=(RawFile,)),
    Row(
        "discard 1 TiB: blkdiscard on a loop device",
        "s",
        discard_terabyte,
        higher_is_better=False,
        bar=0,
        limit=5,  # no ratio: the raw file is one hole, and has no tables
        skip=NO_HOLES,
    ),
    Row(
        "discard: fstrim after deleting 20,000 files",
        "s",
        trim,
        higher_is_better=False,
        bar=0,
        raw_bar=0.9,
        skip=NO_HOLES,
    ),
    Row(
        "discarded disk: buffered random write 4k + fsync",
        "IOPS",
        write_discarded,
        bar=0,
        raw_bar=0.9,
        skip=NO_HOLES,
    ),
    Row(
        "discard of a million scattered clusters: longest wait of another task",
        "ms",
        in_program("longest-wait"),
        higher_is_better=False,
        bar=0,
        limit=20,
        skip=(RawFile, *NO_HOLES),
    ),
    Row(
        "discard of a million scattered clusters, one by one: growth of the process",
        "MiB",
        in_program("growth"),
        higher_is_better=False,
        bar=0,
        limit=2,
        skip=(RawFile, *NO_HOLES),
    ),
)
