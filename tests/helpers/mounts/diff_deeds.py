"""What a process of the differential test does to its part of a raw file, a deed at a time, each with what must come of
it. Those that read fail if it is something else."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import struct

from tests.helpers.judges.parts import PAGE, Part
from tests.helpers.judges.shadow import SECTOR, Shadow, content
from tests.helpers.mounts.diff_handles import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, Handles

RWF_DSYNC = 2
BLKDISCARD = 0x1277


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
        self._random = random.Random(number)
        self._able: set[str] = set()
        self._source: bytes | None = None  # what another raw file of the mount holds

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

    def _written(self, offset: int, size: int) -> None:
        """A write has returned."""
        if "sync" in self._able:  # the mount's option
            self._shadow.synced(offset, size)

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

    def read_only(self) -> None:
        self.read("reader")

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
        self._written(offset, size)

    def direct_write(self) -> None:
        offset, size = self._range(self._random.choice((SECTOR, PAGE)))
        self._open.pwrite("direct", offset, self._write("direct write", offset, size, cached=False))
        self._written(offset, size)

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
        self._written(offset, size)

    def copy(self) -> None:
        source, size = self._range()
        target, room = self._range()
        size = min(size, room)
        if abs(source - target) >= size:
            data = bytes(self._shadow.model[source : source + size])
            self._write(f"copy from {source}", target, size, cached=True, data=data)
            self._open.copy(source, target, size)
            self._written(target, size)

    def copy_from(self) -> None:
        """copy_file_range(2) or sendfile(2) from another raw file of the mount."""
        offset, size = self._range()
        assert self._source is not None
        size = min(size, len(self._source) // 2)
        place = self._random.randrange(len(self._source) - size)
        self._write(
            f"copy from the other's {place}", offset, size, cached=True, data=self._source[place : place + size]
        )
        self._open.copy(place, offset, size, other=True, sendfile=self._random.random() < 0.5)
        self._written(offset, size)

    def punch(self) -> None:
        self._zero("punch", PUNCH_HOLE | KEEP_SIZE)

    def discard(self) -> None:
        """BLKDISCARD, on the loop device: each sector is kept or given up."""
        offset, size = self._range(PAGE)
        before = bytes(self._shadow.model[offset : offset + size])
        self._write("discard", offset, size, cached=False, data=bytes(size))
        fcntl.ioctl(self._open.fd("plain"), BLKDISCARD, struct.pack("QQ", offset, size))
        found = self._open.pread("plain", offset, size)
        for place in range(0, size, SECTOR):
            sector = slice(place, place + SECTOR)
            if any(found[sector]) and found[sector] == before[sector]:
                self._shadow.change(offset + place, found[sector], cached=False)
        self._must_be(offset, size, found, "after a discard, read")

    def zero_range(self) -> None:
        self._zero("zero range", ZERO_RANGE | self._random.choice((0, KEEP_SIZE)))

    def _zero(self, kind: str, mode: int) -> None:
        offset, size = self._range(self._random.choice((1, SECTOR, PAGE) if "file" in self._able else (SECTOR, PAGE)))
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
        kind = self._random.choice(("plain", "direct", "dsync", "reader", "map"))
        self._shadow.note(f"reopen {kind}")
        if kind in ("map", "plain"):
            self._open.unmap()
        if kind != "map":
            self._open.close(kind)


#: What a deed needs and how often it is chosen.
DEEDS: dict[str, tuple[set[str], int]] = {
    "read": (set(), 12),
    "read_only": (set(), 4),
    "direct_read": (set(), 8),
    "load": ({"map"}, 6),
    "receive": (set(), 3),
    "read_neighbour": (set(), 4),
    "seek": ({"file"}, 3),
    "write": (set(), 16),
    "direct_write": (set(), 12),
    "dsync_write": (set(), 3),
    "rwf_write": (set(), 2),
    "store": ({"map"}, 10),
    "send": (set(), 2),
    "copy": ({"file"}, 2),
    "copy_from": ({"source"}, 3),
    "punch": ({"holes"}, 6),
    "discard": ({"discard"}, 4),
    "zero_range": ({"holes"}, 5),
    "sync": (set(), 2),
    "msync": ({"map"}, 2),
    "evict": (set(), 2),
    "reopen": ({"reopen"}, 2),
}
#: Some are more frequent by this factor, for a round.
PROFILES: dict[str, dict[str, int]] = {
    "all": {},
    "syncs": {"sync": 15, "dsync_write": 6, "rwf_write": 6, "msync": 8},
    "maps": {"load": 4, "store": 5, "direct_read": 3, "direct_write": 3, "msync": 3, "evict": 4},
    "holes": {"punch": 6, "zero_range": 6, "seek": 6},
    "copies": {"copy": 8, "copy_from": 8, "send": 6, "receive": 6},
}
