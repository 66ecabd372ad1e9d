"""A process that writes to a raw file for ever and says which of it has been acknowledged as durable.

    python acknowledging.py FILE KIND SEED FIRST_VERSION MINE OF HOLES

The file's 512-byte sectors are dealt out to OF such processes in stripes, so that they meet inside clusters; this one
writes the stripes of number MINE. Each sector says by its bytes which version it is. On standard output, a line a time:

    w FIRST COUNT VERSION       about to write these sectors (an odd version makes a hole of them, if HOLES is 1)
    a                           all announced so far is durable, says the kernel
    e ERRNO                     a call has failed; the last line

KIND is how durability is asked for: `fsync`, `direct` (O_DIRECT and fdatasync), `dsync` (O_DSYNC), `mmap` (msync).
SIGTERM ends it between two calls. Runs by itself, without the project, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import random
import signal
import sys

SECTOR = 512
#: Sectors a stripe: in the file's first half stripes are shorter than most clusters, in the second half longer.
SHORT, LONG = 48, 1024

_PUNCH_HOLE, _KEEP_SIZE = 2, 1


def content(seed: int, sector: int, version: int) -> bytes:
    """What a sector holds after it was written as `version`: nothing like it anywhere else."""
    if version % 2:
        return bytes(SECTOR)
    return hashlib.shake_128(b"%d/%d/%d" % (seed, sector, version)).digest(SECTOR)


class Writer:
    def __init__(self, path: str, kind: str, seed: int, version: int, mine: int, of: int, holes: bool) -> None:
        self._kind = kind
        self._seed = seed
        self._version = version
        self._mine, self._of = mine, of
        self._holes = holes
        self._random = random.Random(f"{seed}/{version}/{mine}")
        flags = {"dsync": os.O_DSYNC, "direct": os.O_DIRECT}.get(kind, 0)
        self._fd = os.open(path, os.O_RDWR | flags)
        self._sectors = os.fstat(self._fd).st_size // SECTOR
        self._map = mmap.mmap(self._fd, 0) if kind == "mmap" else None
        self._buffer = mmap.mmap(-1, LONG * SECTOR)  # O_DIRECT may want aligned memory

    def run(self) -> None:
        while True:
            writes = 1 if self._kind == "dsync" else self._random.choice((1, 1, 2, 5, 12))
            for _ in range(writes):
                self._write()
            if self._map is not None:
                self._map.flush()
            elif self._kind == "direct":
                os.fdatasync(self._fd)
            elif self._kind == "fsync":
                os.fsync(self._fd)
            say("a")

    def _write(self) -> None:
        first, count = self._place()
        hole = self._holes and self._map is None and self._kind != "dsync" and self._random.random() < 0.15
        self._version += 2
        version = self._version + hole
        say(f"w {first} {count} {version}")
        if hole:
            punch(self._fd, first * SECTOR, count * SECTOR)
            return
        data = b"".join(content(self._seed, sector, version) for sector in range(first, first + count))
        if self._map is not None:
            self._map[first * SECTOR : first * SECTOR + len(data)] = data
            return
        self._buffer[: len(data)] = data
        done = 0
        while done < len(data):  # a short write comes before an error
            with memoryview(self._buffer) as view, view[done : len(data)] as rest:
                done += os.pwrite(self._fd, rest, first * SECTOR + done)

    def _place(self) -> tuple[int, int]:
        """Some sectors of one of our stripes."""
        half = self._sectors // 2
        stripe, base = self._random.choice(((SHORT, 0), (SHORT, 0), (LONG, half)))
        number = self._random.randrange(half // stripe // self._of) * self._of + self._mine
        first = self._random.randrange(stripe)
        count = min(stripe - first, self._random.choice((1, 3, 8, 16, 128, stripe)))
        return base + number * stripe + first, count


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


def punch(fd: int, offset: int, size: int) -> None:
    if ctypes.CDLL(None, use_errno=True).fallocate64(
        fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(size)
    ):
        raise OSError(ctypes.get_errno(), "fallocate")


def main() -> None:
    path, kind, *numbers = sys.argv[1:]
    seed, version, mine, of, holes = map(int, numbers)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        Writer(path, kind, seed, version, mine, of, bool(holes)).run()
    except OSError as error:
        say(f"e {error.errno}")


if __name__ == "__main__":
    main()
