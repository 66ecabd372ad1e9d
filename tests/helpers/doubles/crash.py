"""Crash enumeration: a storage that logs what is done to it, and the files that a loss of power could leave.

The model. A write, truncate or punch is durable once a sync that began after it has returned. Until then each 512-byte
sector of it may be on the disk or not, independently of all others: so every sector reads as it was at the last sync or
as any of the pending operations left it, and the file has any of the sizes it had since. That covers every subset of
the unsynced operations, torn at 512 bytes and (sectors of a page going together) at 4 KiB.

A crash point lies before and after every operation, and at the return of a sync.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.helpers.doubles.ram import PAGE, Chaos, RamFile, RamStorage
from tests.helpers.judges.history import SECTOR, ZEROES, Clock

#: How many different states to try, all tests together; the knob for millions.
STATES = int(os.environ.get("QEDFUSE_CRASH_STATES", "50000"))
SEED = int(os.environ.get("QEDFUSE_CRASH_SEED", "1"))
_PER_PAGE = PAGE // SECTOR


@dataclass
class Change:
    """One operation on the file. `when` is the clock's time at which it was done."""

    when: int
    kind: str  # write, truncate, punch, synced
    offset: int = 0
    data: bytes = b""
    size: int = 0  # of a punch, or a truncate's new size
    begun: int = 0  # synced: how many changes the sync covers

    def apply(self, file: RamFile) -> None:
        if self.kind == "write":
            file.write(self.offset, self.data)
        elif self.kind == "truncate":
            file.truncate(self.size)
        elif self.kind == "punch":
            file.punch(self.offset, self.size)


class CrashStorage(RamStorage):
    """A RAM storage that keeps a log. `clock` is the history's, where there is one."""

    def __init__(
        self, path: str, file: RamFile, clock: Clock, *, writable: bool = True, chaos: Chaos | None = None
    ) -> None:
        super().__init__(path, file, writable=writable, chaos=chaos)
        self.clock = clock
        self.start = file.fork()
        self.log: list[Change] = []

    def apply_write(self, offset: int, data: bytes) -> None:
        super().apply_write(offset, data)
        self.log.append(Change(self.clock.tick(), "write", offset, data))

    def apply_truncate(self, size: int) -> None:
        super().apply_truncate(size)
        self.log.append(Change(self.clock.tick(), "truncate", size=size))

    def apply_punch(self, offset: int, size: int) -> None:
        super().apply_punch(offset, size)
        self.log.append(Change(self.clock.tick(), "punch", offset, size=size))

    async def sync(self) -> None:
        begun = len(self.log)
        await super().sync()
        self.log.append(Change(self.clock.tick(), "synced", begun=begun))

    def crash_points(self) -> Iterator[CrashPoint]:
        """Every moment, with what was durable then and what was pending."""
        for when, base, pending in self._stops():
            yield CrashPoint(when, base.fork(), pending)

    def crash_point_now(self) -> CrashPoint:
        """The last of them."""
        *_, (when, base, pending) = self._stops()
        return CrashPoint(when, base, pending)

    def _stops(self) -> Iterator[tuple[int, RamFile, list[Change]]]:
        base = self.start.fork()
        durable = 0
        yield 1, base, []
        for position, change in enumerate(self.log):
            if change.kind == "synced":
                for done in self.log[durable : change.begun]:
                    done.apply(base)
                durable = max(durable, change.begun)
            pending = [pending for pending in self.log[durable : position + 1] if pending.kind != "synced"]
            # A guest operation may return, or begin, at any time until the next change: the clock stands there.
            until = self.log[position + 1].when - 1 if position + 1 < len(self.log) else self.clock.now
            yield until, base, pending


@dataclass
class CrashPoint:
    """One moment of a run: `when` by the clock, the durable file, and the changes that are not durable."""

    when: int
    base: RamFile
    pending: list[Change]
    #: What each sector may hold: the durable content, then that after each pending change (index into pending, bytes).
    choices: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sizes = [(-1, self.base.size)]
        for index, change in enumerate(self.pending):
            size = self.sizes[-1][1]
            if change.kind == "write":
                self._write(index, change)
                size = max(size, change.offset + len(change.data))
            elif change.kind == "punch":
                self._clear(index, change.offset, change.offset + change.size)
            else:
                self._clear(index, change.size, size)
                size = change.size
            if size != self.sizes[-1][1]:
                self.sizes.append((index, size))

    def _write(self, index: int, change: Change) -> None:
        position = 0
        while position < len(change.data):
            number, skip = divmod(change.offset + position, SECTOR)
            part = change.data[position : position + SECTOR - skip]
            old = self._latest(number)
            self._set(index, number, old[:skip] + part + old[skip + len(part) :])
            position += len(part)

    def _clear(self, index: int, start: int, end: int) -> None:
        """Zeroes for all of [start, end) that holds anything."""
        end = min(end, max(self.base.size, (max(self.choices, default=-1) + 1) * SECTOR))
        for number in range(start // SECTOR, -(-end // SECTOR)):
            if number in self.choices or number // _PER_PAGE in self.base.pages:
                low, high = max(start - number * SECTOR, 0), min(end - number * SECTOR, SECTOR)
                old = self._latest(number)
                self._set(index, number, old[:low] + bytes(high - low) + old[high:])

    def _durable(self, number: int) -> bytes:
        return self.base.read(number * SECTOR, SECTOR).ljust(SECTOR, b"\0")

    def _latest(self, number: int) -> bytes:
        choices = self.choices.get(number)
        return choices[-1][1] if choices else self._durable(number)

    def _set(self, index: int, number: int, data: bytes) -> None:
        choices = self.choices.get(number)
        if choices is None:
            durable = self._durable(number)
            if durable == data:
                return
            choices = self.choices[number] = [(-1, durable)]
        choices.append((index, data))

    @property
    def count(self) -> int:
        """How many states there are (some may be equal)."""
        total = len(self.sizes)
        for choices in self.choices.values():
            total *= len(choices)
        return total

    def least(self) -> RamFile:
        """The state with nothing but what was durable."""
        return self._of_operations(set(), None)

    def most(self) -> RamFile:
        """The state in which everything has reached the disk."""
        return self._of_operations(set(range(len(self.pending))), None)

    def every_state(self) -> Iterator[RamFile]:
        numbers = list(self.choices)
        for _index, size in self.sizes:
            for picked in itertools.product(*(self.choices[number] for number in numbers)):
                yield self._build(size, {number: data for number, (_, data) in zip(numbers, picked, strict=True)})

    def some_state(self, rnd: random.Random) -> RamFile:
        """A state drawn at random, in one of the ways in which disks go wrong."""
        how = rnd.randrange(6)
        last = len(self.pending) - 1
        if how == 0:  # sector by sector
            return self._pick(lambda _number: rnd.random(), rnd)
        if how == 1:  # page by page
            pages: dict[int, float] = {}
            return self._pick(lambda number: pages.setdefault(number // _PER_PAGE, rnd.random()), rnd)
        if how == 2:  # a subset of the operations
            kept = {index for index in range(last + 1) if rnd.random() < 0.5}
        elif how == 3:  # all but one
            kept = set(range(last + 1)) - {rnd.randint(0, max(0, last))}
        elif how == 4:  # only one
            kept = {rnd.randint(0, max(0, last))}
        else:  # in order
            kept = set(range(rnd.randint(0, last + 1)))
        return self._of_operations(kept, self.sizes[-1][1] if rnd.random() < 0.3 else None)

    def _pick(self, chance: Callable[[int], float], rnd: random.Random) -> RamFile:
        """Each sector as `chance` (of its number, from 0 up to 1) decides."""
        size = rnd.choice(self.sizes)[1]
        sectors = {number: found[int(chance(number) * len(found))][1] for number, found in self.choices.items()}
        return self._build(size, sectors)

    def _of_operations(self, kept: set[int], size: int | None) -> RamFile:
        sectors = {}
        for number, choices in self.choices.items():
            sectors[number] = next(data for index, data in reversed(choices) if index in kept or index < 0)
        if size is None:
            size = next(value for index, value in reversed(self.sizes) if index in kept or index < 0)
        return self._build(size, sectors)

    def _build(self, size: int, sectors: dict[int, bytes]) -> RamFile:
        file = self.base.fork()
        pages: dict[int, list[tuple[int, bytes]]] = {}
        for number, data in sectors.items():
            pages.setdefault(number // _PER_PAGE, []).append((number % _PER_PAGE, data))
        for index, parts in pages.items():
            old = file.pages.get(index)
            if old is None and all(data == ZEROES for _, data in parts):
                continue
            page = [(old or bytes(PAGE))[start : start + SECTOR] for start in range(0, PAGE, SECTOR)]
            for position, data in parts:
                page[position] = data
            file.pages[index] = b"".join(page)
        file.size = max(file.size, (max(pages, default=0) + 1) * PAGE)
        file.truncate(size)  # what lies past the end is lost
        return file


@dataclass
class JointPoint:
    """One moment of a run on several files."""

    points: tuple[CrashPoint, ...]

    def states(self, rnd: random.Random, *, complete: int, samples: int) -> Iterator[tuple[RamFile, ...]]:
        """What a crash may leave of all files together: all of it if that is at most so much, or a sample."""
        if math.prod(point.count for point in self.points) <= complete:
            for state in itertools.product(*(list(point.every_state()) for point in self.points)):
                yield tuple(file.fork() for file in state)
            return
        yield tuple(point.least() for point in self.points)
        yield tuple(point.most() for point in self.points)
        for _ in range(samples):
            yield tuple(point.some_state(rnd) for point in self.points)


def joint_points(*storages: CrashStorage) -> Iterator[JointPoint]:
    """Every moment of a run on several files, whose storages have one clock."""
    points = [list(storage.crash_points()) for storage in storages]
    begins = [[0, *(change.when for change in storage.log)] for storage in storages]
    for now in sorted({when for of_one in begins for when in of_one}):
        indices = [bisect_right(of_one, now) - 1 for of_one in begins]
        yield JointPoint(tuple(of_one[index] for of_one, index in zip(points, indices, strict=True)))
