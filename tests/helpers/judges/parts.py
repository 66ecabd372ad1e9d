"""How a file is dealt out to the processes that write to it. Pure.

Its first half goes in short stripes, which meet inside clusters, the second half in long ones; both end at pages. What
comes behind is the tail: number 0's, which alone may move the file's end, and only behind the tail's start.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

PAGE = 4096
SHORT, LONG = 5 * PAGE, 80 * PAGE


class Part(NamedTuple):
    """The ranges of number `mine` of `of` in a file whose tail begins at `tail` (bytes, a multiple of 4096)."""

    mine: int
    of: int
    tail: int

    @property
    def _half(self) -> int:
        return self.tail // 2 // SHORT * SHORT

    def stripes(self) -> Iterator[tuple[int, int]]:
        """First byte and end of each, without the tail."""
        for base, end, size in ((0, self._half, SHORT), (self._half, self.tail, LONG)):
            for start in range(base + self.mine * size, end, self.of * size):
                yield start, min(start + size, end)

    def pick(self, rnd: random.Random, size: int) -> tuple[int, int]:
        """One of them; `size`: the file's. One time in four it is the tail, for its owner."""
        if self.mine == 0 and size > self.tail and rnd.random() < 0.25:
            return self.tail, size
        stripes = list(self.stripes())
        return rnd.choice(stripes)

    def all(self, size: int) -> Iterator[tuple[int, int]]:
        """Every range, of a file of `size` bytes."""
        yield from self.stripes()
        if self.mine == 0 and size > self.tail:
            yield self.tail, size
