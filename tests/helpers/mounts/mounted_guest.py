"""A process that uses a raw file as guests do: the scenarios for crashes of a real mount.

    python -m tests.helpers.mounts.mounted_guest SCENARIO FILE JOURNAL HOLES SEED

It waits for a line on standard input, so that somebody can look over its shoulder first. Contents are never the same
twice. HOLES 0: the mount knows no fallocate, zeroes are written instead. Imports little, so that it starts at once.

Asynchronous writes cannot be seen from outside. They are announced by the same write to the file JOURNAL, and when the
Nth (from 0 on) has ended, the journal is truncated to N bytes.

All scenarios are for clusters of 4 KiB and the sizes in SIZES.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Callable

from tests.helpers.mounts.aio import AsynchronousWriter

SECTOR = 512
CLUSTER = 4096
TABLE = 4 << 20  # what the entries of one L2 table are for
SIZE = 48 * CLUSTER + 3 * SECTOR  # ends inside a cluster

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16


class MountedGuest:
    def __init__(self, path: str, journal: str, *, holes: bool, seed: int) -> None:
        self.seed = seed
        self._path = path
        self._fd = os.open(path, os.O_RDWR)
        self._journal = os.open(journal, os.O_RDWR)
        self._writer: AsynchronousWriter | None = None
        self._announced = 0
        self._under_way: dict[int, int] = {}  # the writer's number: that in the journal
        self._holes = holes
        self._tags = itertools.count(1)

    def write(self, offset: int, size: int) -> None:
        self._put(offset, self._content(offset, size))

    def submit(self, places: list[tuple[int, int]]) -> None:
        """Begin to write to these (offset, size), all at once. They do not overlap each other, or what is under way."""
        if self._writer is None:
            self._writer = AsynchronousWriter(self._path)
        writes = [(offset, self._content(offset, size)) for offset, size in places]
        for offset, data in writes:
            os.pwrite(self._journal, data, offset)
        for number in self._writer.submit(writes):
            self._under_way[number] = self._announced
            self._announced += 1

    def settle(self) -> None:
        """Wait for what was submitted."""
        assert self._writer
        for number in self._writer.finished():
            os.ftruncate(self._journal, self._under_way.pop(number))

    def _content(self, offset: int, size: int) -> bytes:
        tag = next(self._tags)
        first = offset // SECTOR
        sectors = range(first, -(-(offset + size) // SECTOR))
        data = b"".join((b"%08x:%06x|" % (tag, sector)) * 32 for sector in sectors)
        return data[offset - first * SECTOR :][:size]

    def _put(self, offset: int, data: bytes) -> None:
        assert os.pwrite(self._fd, data, offset) == len(data)

    def punch(self, offset: int, size: int, *, mode: int = _PUNCH_HOLE) -> None:
        if not self._holes:
            self._put(offset, bytes(size))
            return
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.fallocate64(self._fd, mode | _KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(size))
        assert done == 0, os.strerror(ctypes.get_errno())

    def zero(self, offset: int, size: int) -> None:
        self.punch(offset, size, mode=_ZERO_RANGE)

    def sync(self) -> None:
        os.fsync(self._fd)

    def resize(self, size: int) -> None:
        os.ftruncate(self._fd, size)


def allocate(guest: MountedGuest) -> None:
    for number in range(6):
        guest.write(number * CLUSTER + number * SECTOR, SECTOR)
    guest.sync()
    guest.write(8 * CLUSTER - SECTOR, 2 * SECTOR)  # in two new ones
    guest.write(10 * CLUSTER, CLUSTER)
    guest.write(12 * CLUSTER + 100, 5000)
    guest.write(29 * CLUSTER, 3 * CLUSTER)
    guest.sync()
    guest.write(48 * CLUSTER + SECTOR, SECTOR)  # the last, partial cluster
    guest.write(20 * CLUSTER, 3 * CLUSTER)
    guest.write(CLUSTER, SECTOR)  # in place
    guest.sync()
    guest.write(40 * CLUSTER, SECTOR)  # these are for the end of the mount
    guest.write(15 * CLUSTER + SECTOR, SECTOR)
    guest.write(2 * CLUSTER, CLUSTER)


def sequential(guest: MountedGuest) -> None:
    step = 24 * CLUSTER
    for number in range(4):
        guest.write(number * step, step)
        if number == 1:
            guest.sync()
    guest.sync()
    guest.write(4 * step, step)


def in_place(guest: MountedGuest) -> None:
    guest.write(0, 8 * CLUSTER)
    guest.sync()
    for number in range(8):
        guest.write(number * CLUSTER + number * SECTOR, SECTOR)
        guest.write((8 - number) * CLUSTER - 100 * (1 + number % 2), 150)
        if number % 3 == 2:
            guest.sync()
    guest.write(0, 8 * CLUSTER)


def holes(guest: MountedGuest) -> None:
    """What was punched or zeroed is written again, a sector of it."""
    guest.write(CLUSTER, 3 * CLUSTER)
    guest.sync()
    guest.punch(CLUSTER, 2 * CLUSTER)
    guest.write(CLUSTER + SECTOR, SECTOR)
    guest.sync()
    for number in range(6, 9):
        guest.write(number * CLUSTER + SECTOR, SECTOR)
    guest.sync()
    guest.zero(6 * CLUSTER - SECTOR, 2 * CLUSTER)  # a whole one and parts of two others
    guest.punch(20 * CLUSTER, 2 * CLUSTER)  # of what was never written
    guest.write(20 * CLUSTER + 3 * SECTOR, SECTOR)
    guest.sync()
    guest.punch(3 * CLUSTER, CLUSTER)
    guest.write(10 * CLUSTER, SECTOR)
    guest.sync()
    guest.write(11 * CLUSTER, SECTOR)
    guest.write(3 * CLUSTER + SECTOR, SECTOR)
    guest.zero(8 * CLUSTER, CLUSTER)


def resize(guest: MountedGuest) -> None:
    for cluster in (1, 4, 9, 28):
        guest.write(cluster * CLUSTER, CLUSTER)
    guest.sync()
    guest.resize(4 * CLUSTER + SECTOR)
    guest.resize(10 * CLUSTER)
    guest.write(9 * CLUSTER + SECTOR, SECTOR)
    guest.sync()
    guest.write(10 * CLUSTER, 2 * SECTOR)  # past the end
    guest.write(11 * CLUSTER, SECTOR)
    guest.sync()
    guest.resize(30 * CLUSTER + SECTOR)
    guest.write(29 * CLUSTER + SECTOR, SECTOR)
    guest.resize(9 * CLUSTER + 2 * SECTOR)
    guest.write(4 * CLUSTER + 2 * SECTOR, SECTOR)
    guest.sync()
    guest.resize(20 * CLUSTER)
    guest.write(19 * CLUSTER, SECTOR)


def tables(guest: MountedGuest) -> None:
    """Three L2 tables, one after another and two in one commit."""
    guest.write(TABLE - SECTOR, 2 * SECTOR)
    guest.write(TABLE + CLUSTER, SECTOR)
    guest.sync()
    guest.write(CLUSTER, SECTOR)
    guest.write(2 * TABLE + 8 * CLUSTER, SECTOR)
    guest.write(2 * TABLE + CLUSTER, SECTOR)
    guest.write(TABLE + 5 * CLUSTER, SECTOR)
    guest.sync()
    guest.write(2 * CLUSTER, SECTOR)
    guest.write(3 * TABLE, SECTOR)
    guest.write(3 * TABLE + 5 * CLUSTER, SECTOR)


def timer(guest: MountedGuest) -> None:
    """Nobody asks for durability: tables are written a second after the first change, while more is written."""
    start = time.monotonic()
    guest.write(0, SECTOR)
    guest.write(3 * CLUSTER, CLUSTER)
    guest.punch(0, CLUSTER)
    time.sleep(0.97)
    number = 0
    while time.monotonic() < start + 1.1:
        guest.write(number * 5 % 48 * CLUSTER + number // 48 * SECTOR, SECTOR)
        number += 1
        time.sleep(0.001)


def threads(guest: MountedGuest) -> None:
    """Three write into the same clusters, each its sectors, and sometimes all the same one; they sync as they like."""

    def work(mine: int) -> None:
        rnd = random.Random(guest.seed * 10 + mine)
        for number in range(8):
            cluster = rnd.randrange(10)
            guest.write(cluster * CLUSTER + mine * SECTOR, SECTOR)
            guest.write(rnd.randrange(20, 24) * CLUSTER, SECTOR)
            if number % 3 == mine:
                guest.sync()

    workers = [threading.Thread(target=work, args=(mine,)) for mine in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def asynchronous(guest: MountedGuest) -> None:
    """Several writes at a time, into new clusters and in place."""
    rnd = random.Random(guest.seed)
    for _ in range(2):
        sectors = rnd.sample(range(48 * CLUSTER // SECTOR), 16)
        guest.submit([(sector * SECTOR, SECTOR) for sector in sectors])
        guest.sync()
        guest.settle()
    guest.submit([(number * CLUSTER, SECTOR) for number in range(6)])
    guest.settle()


def walk(guest: MountedGuest) -> None:
    """Everything, at random."""
    rnd = random.Random(guest.seed)
    for _ in range(40):
        _step(guest, rnd)


def _step(guest: MountedGuest, rnd: random.Random) -> None:
    sectors = rnd.choice([1, 2, 8, 9, 20])
    offset = rnd.randrange(16 * 8 - sectors) * SECTOR
    start = offset - offset % CLUSTER
    choices: list[Callable[[], None]] = [
        lambda: guest.write(offset, sectors * SECTOR),
        lambda: guest.write(start, sectors * SECTOR),
        lambda: guest.write(offset + 77, sectors * SECTOR - 200),
        lambda: guest.zero(offset, sectors * SECTOR),
        lambda: guest.punch(start, CLUSTER),
        guest.sync,
    ]
    rnd.choice(choices)()


SCENARIOS = {
    function.__name__: function
    for function in (allocate, sequential, in_place, holes, resize, tables, timer, threads, asynchronous, walk)
}
#: The size of the image, where it is another than SIZE.
SIZES = {"sequential": 160 * CLUSTER, "tables": 3 * TABLE + 8 * CLUSTER}


def main() -> None:
    scenario, path, journal, knows_holes, seed = sys.argv[1:]
    sys.stdin.readline()
    SCENARIOS[scenario](MountedGuest(path, journal, holes=knows_holes == "1", seed=int(seed)))


if __name__ == "__main__":
    main()
