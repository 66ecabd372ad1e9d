"""What number 0 does to the size of the raw file: it moves only in the tail, which is its own."""

from __future__ import annotations

import os

from tests.helpers.judges.parts import PAGE
from tests.helpers.judges.shadow import SECTOR
from tests.helpers.mounts.diff_deeds import Deeds, Failed, rounded
from tests.helpers.mounts.diff_handles import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE


class SizeDeeds(Deeds):
    def truncate(self) -> None:
        rnd = self._random
        size = rnd.randrange(self._tail, self._capacity + 1)
        size -= size % rnd.choice((1, 1, 1, SECTOR, PAGE))
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
            self._written(offset, size)
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

    def zero_across(self) -> None:
        """Zeroes over the end, which stays where it is."""
        if "holes" in self._able and self._size > self._tail:
            offset = self._random.randrange(max(self._tail, self._size - 12 * PAGE), self._size)
            mode = self._random.choice((ZERO_RANGE, PUNCH_HOLE)) | KEEP_SIZE
            self._write(
                f"zero across {mode}", offset, self._size - offset, cached=False, data=bytes(self._size - offset)
            )
            self._open.fallocate(mode, offset, self._random.randrange(self._size - offset, 40 * PAGE))
            self._check_size()


#: How often each is chosen.
SIZE_DEEDS = {"truncate": 8, "extend": 8, "append": 3, "zero_behind": 3, "zero_across": 2}
