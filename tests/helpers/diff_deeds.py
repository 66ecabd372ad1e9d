"""What a process of the differential test does to its part of a raw file, a deed at a time, each with what must come of
it. Those that read fail if it is something else."""

from __future__ import annotations

import errno
import mmap
import os
import random

from tests.helpers.diff_handles import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, Handles
from tests.helpers.parts import PAGE, Part
from tests.helpers.shadow import SECTOR, Shadow, content

RWF_DSYNC = 2


class Failed(Exception):
    """What a call has read is wrong."""


def rounded(size: int) -> int:
    return -(-size // SECTOR) * SECTOR


class Deeds:
    """`size` is the raw file's, to the byte where the kernel keeps it so; qedfuse rounds it up to a sector."""

    def __init__(self, model: str, number: int, of: int, tail: int, capacity: int) -> None:
        with open(model, "r+b") as file:
            self._shadow = Shadow(mmap.mmap(file.fileno(), capacity))
        self._number, self._of = number, of
        self._part = Part(number, of, tail)
        self._tail, self._capacity = tail, capacity
        self._size = 0
        self._sizes: set[int] = set()  # those that a crash may leave
        self._sectors = 0
        self._handles: Handles | None = None
        self._random = random.Random()
        self._able: set[str] = set()

    # -- small parts ---------------------------------------------------------------------------------------------------

    @property
    def _open(self) -> Handles:
        assert self._handles is not None
        return self._handles

    def _all_durable(self) -> None:
        self._shadow.synced()
        self._sizes = {self._size}

    def _range(self, align: int = 1) -> tuple[int, int]:
        """Some bytes of ours: offset and size."""
        low, high = self._part.pick(self._random, self._size // align * align)
        most = self._random.choice((1, 100, SECTOR, PAGE, PAGE, 3 * PAGE, 16 * PAGE, high - low))
        size = max(1, min(most, high - low) // align) * align
        place = low + self._random.randrange((high - low - size) // align + 1) * align
        return place, size

    def _write(self, kind: str, offset: int, size: int, *, cached: bool, data: bytes | None = None) -> bytes:
        """Note a write, and what to write: now and then zeroes."""
        number = self._shadow.note(kind, offset, size)
        if data is None:
            data = bytes(size) if self._random.random() < 0.1 else content(self._number, number, offset, size)
        self._shadow.change(offset, data, cached=cached)
        return data

    def _differs(self, offset: int, size: int, found: bytes, how: str) -> list[str]:
        """What lies behind the file's end may be had up to a sector's, as zeroes, or not."""
        self._sectors += len(found) // SECTOR
        end = min(offset + size, self._size) if offset + size > self._tail else offset + size
        if len(found) < end - offset:
            return [f"{how} of {size} at {offset}: {len(found)} bytes only; the size is {self._size}"]
        return [f"{how} of {size} at {offset}: {text}" for text in self._shadow.wrong(offset, found)]

    def _must_be(self, offset: int, size: int, found: bytes, how: str) -> None:
        wrong = self._differs(offset, size, found, how)
        if wrong:
            raise Failed(f"{len(wrong)} sectors:\n" + "\n".join(wrong[:4]))

    def _check_size(self) -> None:
        size = os.fstat(self._open.fd("plain")).st_size
        if self._number == 0 and size not in (self._size, rounded(self._size)):
            raise Failed(f"the size is {size}, not {self._size}\n{self._shadow.story(self._size // SECTOR)}")

    # -- deeds: reading ------------------------------------------------------------------------------------------------

    def read(self, kind: str = "plain", align: int = 1) -> None:
        offset, size = self._range(align)
        self._shadow.note(f"{kind} read", offset, size)
        self._must_be(offset, size, self._open.pread(kind, offset, size), f"{kind} read")

    def direct_read(self) -> None:
        self.read("direct", SECTOR)

    def load(self) -> None:
        offset, size = self._range()
        self._shadow.note("load", offset, size)
        self._must_be(offset, size, self._open.load(offset, size), "load")

    def receive(self) -> None:
        offset, size = self._range()
        self._shadow.note("sendfile out", offset, size)
        self._must_be(offset, size, self._open.receive(offset, size), "sendfile out")

    def read_neighbour(self) -> None:
        """What another is writing at this moment: for the page cache's sake."""
        offset = self._random.randrange(self._tail)
        self._open.pread("plain", offset, self._random.choice((1, 16)) * PAGE)

    def seek(self) -> None:
        """Where there is said to be a hole, there are zeroes."""
        offset, size = self._range()
        self._shadow.note("seek", offset, size)
        try:
            data = os.lseek(self._open.fd("plain"), offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = self._size
        hole = min(data, offset + size) - offset
        if hole > 0:
            self._must_be(offset, hole, bytes(hole), "SEEK_DATA says it is a hole: read")

    # -- deeds: writing ------------------------------------------------------------------------------------------------

    def write(self) -> None:
        offset, size = self._range()
        self._open.pwrite("plain", offset, self._write("write", offset, size, cached=True))

    def direct_write(self) -> None:
        offset, size = self._range(self._random.choice((SECTOR, PAGE)))
        self._open.pwrite("direct", offset, self._write("direct write", offset, size, cached=False))

    def dsync_write(self) -> None:
        offset, size = self._range()
        self._open.pwrite("dsync", offset, self._write("dsync write", offset, size, cached=True))
        self._shadow.synced(offset, size)

    def rwf_write(self) -> None:
        offset, size = self._range()
        data = self._write("RWF_DSYNC write", offset, size, cached=True)
        self._open.pwrite("plain", offset, data, RWF_DSYNC)
        if "rwf" in self._able:
            self._shadow.synced(offset, size)

    def store(self) -> None:
        offset, size = self._range()
        self._open.store(offset, self._write("store", offset, size, cached=True))

    def send(self) -> None:
        offset, size = self._range()
        self._open.send(offset, self._write("sendfile in", offset, size, cached=True))

    def copy(self) -> None:
        source, size = self._range()
        target, room = self._range()
        size = min(size, room)
        if abs(source - target) >= size:
            data = bytes(self._shadow.model[source : source + size])
            self._write(f"copy from {source}", target, size, cached=True, data=data)
            self._open.copy(source, target, size)

    def punch(self) -> None:
        self._zero("punch", PUNCH_HOLE | KEEP_SIZE)

    def zero_range(self) -> None:
        self._zero("zero range", ZERO_RANGE | self._random.choice((0, KEEP_SIZE)))

    def _zero(self, kind: str, mode: int) -> None:
        offset, size = self._range(self._random.choice((1, SECTOR, PAGE)))
        self._write(kind, offset, size, cached=False, data=bytes(size))
        self._open.fallocate(mode, offset, size)

    # -- deeds: durability, the page cache, the handles ----------------------------------------------------------------

    def sync(self) -> None:
        rnd = self._random
        kind = rnd.choice(("plain", "plain", "direct"))
        self._shadow.note(f"{kind} sync")
        rnd.choice((os.fsync, os.fdatasync))(self._open.fd(kind))
        self._all_durable()

    def msync(self) -> None:
        offset, size = self._range()
        self._shadow.note("msync", offset, size)
        self._open.msync(offset, offset + size)
        self._shadow.synced(offset, size)

    def evict(self) -> None:
        offset, size = self._range()
        self._shadow.note("evict", offset, size)
        os.posix_fadvise(self._open.fd("plain"), offset, size, os.POSIX_FADV_DONTNEED)

    def reopen(self) -> None:
        kind = self._random.choice(("plain", "direct", "dsync", "map"))
        self._shadow.note(f"reopen {kind}")
        if kind in ("map", "plain"):
            self._open.unmap()
        if kind != "map":
            self._open.close(kind)

    # -- deeds: the size -----------------------------------------------------------------------------------------------

    def truncate(self) -> None:
        rnd = self._random
        size = rnd.randrange(self._tail, self._capacity + 1)
        size -= size % rnd.choice((SECTOR, SECTOR, PAGE))
        size = max(size, self._tail)
        self._shadow.note("truncate to", size, max(self._size - size, 1))
        if size < self._size:
            self._shadow.change(size, bytes(self._size - size), cached=False)
        self._sizes |= {size, rounded(size)}
        os.ftruncate(self._open.fd("plain"), size)
        self._size = size
        self._check_size()

    def extend(self) -> None:
        """A write across the end or behind it."""
        rnd = self._random
        kind, align = rnd.choice((("plain", 1), ("plain", 1), ("direct", SECTOR)))
        offset = self._size + rnd.choice((-1, 0, 1)) * rnd.randrange(8 * PAGE)
        offset = max(self._tail, offset - offset % align)
        size = rnd.choice((SECTOR, PAGE, 5 * PAGE, rnd.randrange(1, 9 * PAGE))) // align * align
        if size and self._size < offset + size <= self._capacity:
            self._sizes |= {rounded(offset + size)}
            self._open.pwrite(kind, offset, self._write(f"{kind} write", offset, size, cached=True))
            self._size = offset + size
            self._check_size()

    def append(self) -> None:
        size = self._random.randrange(1, 3 * PAGE)
        if self._size % SECTOR == 0 and self._size + size <= self._capacity:
            self._sizes |= {rounded(self._size + size)}
            data = self._write("append", self._size, size, cached=True)
            self._open.fd("append")
            if os.write(self._open.fd("append"), data) != size:
                raise Failed("a short append")
            self._size += size
            self._check_size()

    def zero_behind(self) -> None:
        """ZERO_RANGE or preallocation past the end."""
        rnd = self._random
        offset = max(self._tail, self._size - rnd.randrange(4 * PAGE))
        size = rnd.randrange(1, 12 * PAGE)
        zero = rnd.random() < 0.5
        if "holes" in self._able and self._size < offset + size <= self._capacity:
            self._sizes |= {rounded(offset + size)}
            self._shadow.note("zero behind" if zero else "preallocate", offset, size)
            if zero:
                self._shadow.change(offset, bytes(size), cached=False)
            self._open.fallocate(ZERO_RANGE if zero else 0, offset, size)
            self._size = offset + size
            self._check_size()


#: What a deed needs and how often it is chosen.
DEEDS: dict[str, tuple[set[str], int]] = {
    "read": (set(), 12),
    "direct_read": (set(), 8),
    "load": ({"map"}, 6),
    "receive": (set(), 3),
    "read_neighbour": (set(), 4),
    "seek": (set(), 3),
    "write": (set(), 16),
    "direct_write": (set(), 12),
    "dsync_write": (set(), 3),
    "rwf_write": (set(), 2),
    "store": ({"map"}, 10),
    "send": (set(), 2),
    "copy": (set(), 2),
    "punch": ({"holes"}, 6),
    "zero_range": ({"holes"}, 5),
    "sync": (set(), 2),
    "msync": ({"map"}, 2),
    "evict": (set(), 2),
    "reopen": (set(), 2),
}
SIZE_DEEDS = {"truncate": 8, "extend": 8, "append": 3, "zero_behind": 3}
