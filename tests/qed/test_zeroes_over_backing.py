"""Zeroes over a backing file, on the raw file: whole clusters and parts of them, written again, zeroed again.

Without the fast path there is no fallocate, and zeroes are written. After each step: QEMU finds nothing wrong and
nothing leaked, and reads what we read.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.helpers.judges.discards import BELOW, HOLES, KIB, assert_nothing_leaked, assert_reads_as, cases
from tests.helpers.mounts.guests import run
from tests.helpers.mounts.mounts import mounted, need_fuse
from tests.helpers.qemu.cli import qemu_io

#: Places and lengths in the tables below are in quarters of a cluster.
QUARTERS = 4
#: Clusters of the backing file, all of them data; the image goes on.
BASE = 64

Ranges = list[tuple[int, int]]

#: A run of whole clusters; the end of one to the begin of another; inside one; the backing file's last, and beyond.
ZEROED: Ranges = [(4 * 8, 4 * 12), (4 * 30 + 1, 13), (4 * 40 + 1, 2), (4 * 63 + 2, 4 * 3)]
#: Into zeroes and data at both ends of them, and inside: parts of clusters, and one whole.
WRITTEN: Ranges = [(4 * 8 - 1, 2), (4 * 8 + 2, 3), (4 * 11, 4), (4 * 20 - 2, 4), (4 * 31 + 2, 1), (4 * 65, 1)]
AGAIN: Ranges = [(4 * 8, 4 * 12), (4 * 31, 4), (4 * 64 + 3, 4)]


@pytest.mark.parametrize(
    ("way", "cluster", "below"),
    cases(
        [
            ("fallocate", 4 * KIB, "raw"),
            ("fallocate", 64 * KIB, "qcow2"),
            ("written", 4 * KIB, "qcow2"),
            ("written", 64 * KIB, "qed"),
        ],
        ["fallocate", "written"],
        [4 * KIB, 16 * KIB, 64 * KIB],
        [below for below in BELOW if below != "none"],
    ),
)
def test_zero_write_and_zero_again(tmp_path: Path, raw: Path, way: str, cluster: int, below: str) -> None:
    need_fuse()
    if way == "fallocate" and not HOLES:
        pytest.skip("without the fast path there is no fallocate")
    quarter = cluster // QUARTERS
    size = (6 << 30) // (64 * KIB) * cluster  # of many L2 tables
    disk = Disk(tmp_path, cluster, size, below)

    with mounted(disk.image, raw):
        for start, length in ZEROED:
            disk.zero(raw, start * quarter, length * quarter, way)
        disk.verify(raw)
    disk.assert_sound()

    with mounted(disk.image, raw):
        for start, length in WRITTEN:
            disk.write(raw, start * quarter, length * quarter)
        disk.verify(raw)
    disk.assert_sound()
    used = disk.image.stat().st_size

    with mounted(disk.image, raw):
        for start, length in AGAIN:
            disk.zero(raw, start * quarter, length * quarter, way)
        disk.verify(raw)
        for start, length in WRITTEN:
            disk.write(raw, start * quarter, length * quarter)
            disk.zero(raw, start * quarter, length * quarter, way)
        disk.verify(raw)
    disk.assert_sound()
    assert disk.image.stat().st_size <= used + cluster  # (the last of AGAIN touches one cluster more)

    # What we have zeroed is written by QEMU, and seen by us.
    for number, (start, length) in enumerate(WRITTEN):
        qemu_io(disk.image, f"write -q -P {number + 1} {start * quarter} {length * quarter}")
        disk.put(start * quarter, bytes([number + 1]) * (length * quarter))
    disk.assert_sound()
    assert disk.image.stat().st_size <= used + cluster
    with mounted(disk.image, raw):
        disk.verify(raw)


class Disk:
    """An image over a backing file, and a raw file with what it must read as."""

    def __init__(self, directory: Path, cluster: int, size: int, below: str) -> None:
        self.image, self._model = directory / "disk.qed", directory / "model"
        self._end = (BASE + 4) * cluster
        self._random = random.Random(cluster)
        base, backing = directory / "base", directory / f"base.{below}"
        base.write_bytes(self._random.randbytes(BASE * cluster))
        run("cp", base, self._model)
        os.truncate(self._model, size)
        run("qemu-img", "convert", "-f", "raw", "-O", below, base, backing)
        options = f"cluster_size={cluster}"
        run(
            *("qemu-img", "create", "-q", "-f", "qed", "-o", options, "-b", backing, "-F", below),
            *(self.image, str(size)),
        )

    def zero(self, raw: Path, offset: int, size: int, way: str) -> None:
        if way == "fallocate":
            run("fallocate", "-z", "-n", "-o", str(offset), "-l", str(size), raw)
        else:
            pwrite(raw, bytes(size), offset)
        self.put(offset, bytes(size))

    def write(self, raw: Path, offset: int, size: int) -> None:
        data = self._random.randbytes(size)
        pwrite(raw, data, offset)
        self.put(offset, data)

    def put(self, offset: int, data: bytes) -> None:
        pwrite(self._model, data, offset)

    def verify(self, raw: Path) -> None:
        with raw.open("rb") as seen, self._model.open("rb") as model:
            assert seen.read(self._end) == model.read(self._end)

    def assert_sound(self) -> None:
        assert_nothing_leaked(self.image)
        assert_reads_as(self.image, self._model)


def pwrite(path: Path, data: bytes, offset: int) -> None:
    with path.open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), data, offset) == len(data)
