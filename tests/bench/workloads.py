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
    mount_time,
    on_fresh,
    on_full,
    processor_time,
    resident_memory,
    syncs_per_1000,
    trim,
    warm_reads,
    write_discarded,
)
from tests.bench.offline import check_terabyte, convert, info_time
from tests.bench.targets import NbdFuse, QedFusePython, RawFile, StorageDaemon, Target


@dataclass(frozen=True)
class Row:
    """`measure` gets a fresh target, returns a figure. `bar`: the ratio to the peer that we promise (0: no ratio).
    `raw_bar`: the same to the raw file. `limit`: the largest figure that we allow ourselves (0: any). `offline`: done
    by a tool, not to the flat file."""

    title: str
    unit: str
    measure: Callable[[Target, Context], float]
    higher_is_better: bool = True
    bar: float = 1.0
    raw_bar: float = 0.0
    limit: float = 0.0
    skip: tuple[type[Target], ...] = ()
    offline: bool = False

    def takes(self, kind: type[Target]) -> bool:
        """Whether it is measured for this kind of target, and for those that are derived from it."""
        return not issubclass(kind, self.skip) and bool(kind.tool or not self.offline)


DIRECT = "--direct=1"
READ_BY_8 = ("--rw=randread", "--bs=4k", DIRECT, "--numjobs=8")
WRITE_BY_8 = ("--rw=randwrite", "--bs=4k", DIRECT, "--numjobs=8")
#: All but the one whose programs import the engine.
OTHERS = (RawFile, StorageDaemon, NbdFuse, QedFusePython)
CONVERSIONS = (
    ("raw", False, "512 MiB of raw data to QED"),
    ("qed", False, "a full 512 MiB image to raw"),
    ("raw", True, "2 GiB of raw, a fourth of it data, to QED"),
    ("qed", True, "a 2 GiB image, a fourth of it data, to raw"),
)
ROWS: tuple[Row, ...] = (
    Row("random read 4k direct, 1 reader", "IOPS", on_full("--rw=randread", "--bs=4k", DIRECT), bar=2),
    Row("random read 4k direct, 8 readers", "IOPS", on_full(*READ_BY_8), bar=2),
    Row("random write 4k direct in place, 1 writer", "IOPS", on_full("--rw=randwrite", "--bs=4k", DIRECT), bar=2),
    Row("random write 4k direct in place, 8 writers", "IOPS", on_full(*WRITE_BY_8), bar=2),
    Row(
        "processor time of a random read 4k direct, 8 readers",
        "µs",
        processor_time(*READ_BY_8),
        higher_is_better=False,
        skip=(RawFile,),
    ),
    Row(
        "processor time of a random write 4k direct in place, 8 writers",
        "µs",
        processor_time(*WRITE_BY_8),
        higher_is_better=False,
        skip=(RawFile,),
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
    Row("info", "s", info_time, higher_is_better=False, bar=0, offline=True),
    *(
        Row(
            f"{'processor time: ' if processor else ''}convert {what}, and a sync",
            "s",
            convert(source_format, sparse=sparse, processor=processor),
            higher_is_better=False,
            bar=1 if processor else 1.3,
            offline=True,
        )
        for processor in (False, True)
        for source_format, sparse, what in CONVERSIONS
    ),
    Row("check a full 1 TiB image", "s", check_terabyte, higher_is_better=False, offline=True),
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
    ),
    Row(
        "discard: fstrim after deleting 20,000 files",
        "s",
        trim,
        higher_is_better=False,
        bar=0,
        raw_bar=0.9,
    ),
    Row(
        "discarded disk: buffered random write 4k + fsync",
        "IOPS",
        write_discarded,
        bar=0,
        raw_bar=0.9,
    ),
    Row(
        "discard of a million scattered clusters: longest wait of another task",
        "ms",
        in_program("longest-wait"),
        higher_is_better=False,
        bar=0,
        limit=20,
        skip=OTHERS,
    ),
    Row(
        "discard of a million scattered clusters, one by one: growth of the process",
        "MiB",
        in_program("growth"),
        higher_is_better=False,
        bar=0,
        limit=2,
        skip=OTHERS,
    ),
)
