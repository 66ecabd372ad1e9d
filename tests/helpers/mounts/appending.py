"""A process that appends records to a raw file.

    python appending.py FILE NUMBER COUNT FLAGS     FLAGS: of open(2), besides O_APPEND

A record is some 512-byte sectors, each of which begins with its writer's NUMBER, the record's number, the sector's and
how many there are. Runs by itself, without the project, so that it starts at once.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import sys

SECTOR = 512
HEAD = struct.Struct("<IIII")


def record(number: int, turn: int, sectors: int) -> bytes:
    return b"".join(
        (HEAD.pack(number, turn, sector, sectors) * (SECTOR // HEAD.size))[:SECTOR] for sector in range(sectors)
    )


def main() -> None:
    path, *words = sys.argv[1:]
    number, count, flags = map(int, words)
    rnd = random.Random(number)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | flags)
    with mmap.mmap(-1, 64 * SECTOR) as buffer, memoryview(buffer) as view:  # O_DIRECT wants aligned memory
        for turn in range(1, count + 1):
            data = record(number, turn, rnd.choice((1, 1, 2, 8, 9, 60)))
            view[: len(data)] = data
            if os.write(fd, view[: len(data)]) != len(data):
                sys.exit("a short write")
            if rnd.random() < 0.2:
                os.fsync(fd)
    os.close(fd)


if __name__ == "__main__":
    main()
