"""What a guest did, and what each sector may therefore read as: now, or after a crash at any moment.

Each sector (and the image's size) is a register with versions. A version has a time when its operation began, one when
it ended (for good or ill), and one from which on it is durable. A version is gone for sure once a later one (begun
after it ended) has ended - or, after a crash, was durable by then. All others are possible.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from qedfuse.qed.image import Image
from qedfuse.sizes import round_up

SECTOR = 512
NEVER = 1 << 60
ZEROES = bytes(SECTOR)
_LARGE = 1 << 20  # bytes; to keep each of their sectors on record takes too long

V = TypeVar("V")


@dataclass
class Version(Generic[V]):
    value: V
    begin: int
    end: int = NEVER
    completed: int = NEVER  # as `end`, but only if the operation succeeded
    durable: int = NEVER


@dataclass
class Register(Generic[V]):
    versions: list[Version[V]]

    def after_crash(self, when: int) -> set[V]:
        """What a crash at `when` may leave."""
        known = [version for version in self.versions if version.begin <= when]
        return {v.value for v in known if not any(w.durable <= when and w.begin > v.end for w in known)}

    def visible(self, since: int, until: int) -> set[V]:
        """What somebody may see who looked between `since` and `until`."""
        known = [version for version in self.versions if version.begin <= until]
        return {v.value for v in known if not any(w.completed <= since and w.begin > v.end for w in known)}


def content(tag: int, sector: int) -> bytes:
    """A sector's content that tells who wrote it and where to; no two alike, none zero."""
    return (b"%08x:%06x|" % (tag, sector)) * 32


def fill(tag: int, offset: int, size: int) -> bytes:
    """Contents for a range whose ends are sectors' ends."""
    return b"".join([content(tag, sector) for sector in range(offset // SECTOR, (offset + size) // SECTOR)])


@lru_cache(maxsize=16)
def end_of_data(content: bytes) -> int:
    """Where the last byte that is not zero ends. Megabytes of zeroes are slow to strip."""
    return len(content.rstrip(b"\0"))


class Clock:
    """Counts what happens; `now` is the last tick."""

    def __init__(self) -> None:
        self.now = 1

    def tick(self) -> int:
        self.now += 1
        return self.now


class History(Clock):
    """Versions of all sectors. `initial` is the content before anything was done; zeroes follow."""

    def __init__(self, initial: bytes) -> None:
        super().__init__()
        self.initial = initial
        self.initial_data = end_of_data(initial)  # nothing but zeroes behind
        self.sectors: dict[int, Register[bytes]] = {}
        self.size = Register([Version(len(initial), -2, -1, -1, 0)])
        self.milestones: list[int] = []  # when something became durable
        self._wide: list[tuple[int, int, Version[bytes]]] = []  # zeroes for many sectors: first, end

    def sector(self, number: int) -> Register[bytes]:
        register = self.sectors.get(number)
        if register is None:
            value = self.initial[number * SECTOR : (number + 1) * SECTOR] or ZEROES
            register = self.sectors[number] = Register([Version(value.ljust(SECTOR, b"\0"), -2, -1, -1, 0)])
            register.versions += [version for first, end, version in self._wide if first <= number < end]
        return register

    def begin(self, offset: int, data: bytes) -> list[Version[bytes]]:
        """Somebody starts to write `data`. In a sector that is covered in part, what was there before may be anything
        that is visible now (so such writes must not run into each other)."""
        now = self.tick()
        versions = []
        for number in range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)):
            start = number * SECTOR
            low, high = max(offset, start), min(offset + len(data), start + SECTOR)
            part = data[low - offset : high - offset]
            register = self.sector(number)
            olds = [ZEROES] if len(part) == SECTOR else register.visible(now, now)
            for old in olds:
                version = Version(old[: low - start] + part + old[high - start :], now)
                register.versions.append(version)
                versions.append(version)
        return versions

    def begin_zeroes(self, offset: int, size: int) -> list[Version[bytes]]:
        """Somebody starts to zero a large range of whole sectors. Those that never held anything are left out."""
        first, end = offset // SECTOR, (offset + size) // SECTOR
        version = Version(ZEROES, self.tick())
        for number in self.ever_data(first, end):
            self.sector(number).versions.append(version)
        self._wide.append((first, end, version))
        return [version]

    def ever_data(self, first: int, end: int) -> list[int]:
        """The sectors of [first, end) that were ever written or that hold something from the beginning."""
        known = [number for number in self.sectors if first <= number < end]
        last = -(-self.initial_data // SECTOR)
        return known + [number for number in range(first, min(end, last)) if number not in self.sectors]

    def begin_size(self, size: int) -> Version[int]:
        version = Version(size, self.tick())
        self.size.versions.append(version)
        return version

    def end(self, versions: Iterable[Version[bytes] | Version[int]], *, ok: bool = True) -> None:
        now = self.tick()
        for version in versions:
            version.end = now
            if ok:
                version.completed = now

    def end_shrink(self, version: Version[int], old: int) -> None:
        """A shrink is durable when it returns; what it cut off is zeroes whenever the image grows again."""
        self.end([version])
        version.durable = now = self.now
        self.milestones.append(now)
        for number in self.ever_data(version.value // SECTOR, -(-old // SECTOR)):
            self.sector(number).versions.append(Version(ZEROES, now, now, now, now))

    def flushed(self, began: int) -> None:
        """A flush that began at `began` has returned."""
        now = self.tick()
        self.milestones.append(now)
        registers: list[Register[bytes] | Register[int]] = [self.size, *self.sectors.values()]
        for register in registers:
            for version in register.versions:
                if version.completed <= began and version.durable == NEVER:
                    version.durable = now


@dataclass
class Guest:
    """An image whose operations are put on record. Errors pass through; what failed may have happened or not.

    `may_fail`: a scenario must not rely on what it has done.
    """

    image: Image
    history: History
    cluster_size: int
    tag: int = 0
    size_failed: bool = False
    may_fail: bool = False

    async def _do(self, versions: list[Version[bytes]], function: Callable[[], Awaitable[None]]) -> None:
        try:
            await function()
        except BaseException:
            self.history.end(versions, ok=False)
            raise
        self.history.end(versions)

    async def write(self, offset: int, size: int, *, data: bytes | None = None) -> None:
        """Unique contents, or `data`. Past the end: the image grows."""
        self.tag += 1
        if data is None:
            data = fill(self.tag, offset - offset % SECTOR, round_up(offset % SECTOR + size, SECTOR))
            data = data[offset % SECTOR :][:size]
        grown = []
        if offset + size > self.image.size:
            grown.append(self.history.begin_size(round_up(offset + size, SECTOR)))
        versions = self.history.begin(offset, data)

        async def write() -> None:
            slow = self.tag % 2  # every other write takes the long way, even if it need not
            if slow or not self.image.write_nowait(offset, data):
                await self.image.write(offset, data)

        try:
            await self._do(versions, write)
        except BaseException:
            self.history.end(grown, ok=False)
            self.size_failed |= bool(grown)
            raise
        self.history.end(grown)

    async def zero(self, offset: int, size: int) -> None:
        size = min(size, self.image.size - offset)
        await self._do(self._begin_zeroes(offset, size), lambda: self.image.zero(offset, size))

    async def discard(self, offset: int, size: int) -> None:
        first, end = round_up(offset, self.cluster_size), offset + size
        end = self.image.size if end >= self.image.size else end - end % self.cluster_size
        await self._do(self._begin_zeroes(first, max(0, end - first)), lambda: self.image.discard(offset, size))

    def _begin_zeroes(self, offset: int, size: int) -> list[Version[bytes]]:
        if size > _LARGE:
            return self.history.begin_zeroes(offset, size)
        return self.history.begin(offset, bytes(size))

    async def resize(self, end: int) -> None:
        """What is cut off inside of a sector that stays becomes zeroes."""
        old, size = self.image.size, round_up(end, SECTOR)
        version = self.history.begin_size(size)
        rest = self.history.begin(end, bytes(min(size, old) - end)) if end < old else []
        try:
            await self.image.resize(end)
        except BaseException:
            self.history.end(rest, ok=False)
            if size < old and self.image.size == size:  # the size is durable, only the rest went wrong
                self.history.end_shrink(version, old)
            else:
                self.history.end([version], ok=False)
                self.size_failed = True
            raise
        self.history.end(rest)
        if size < old:
            self.history.end_shrink(version, old)
        else:
            self.history.end([version])

    async def flush(self) -> None:
        began = self.history.tick()
        await self.image.flush()
        self._flushed(began)

    def _flushed(self, began: int) -> None:
        self.history.flushed(began)
        if self.size_failed:  # whatever the file said in the meantime, now it must say what the image said before
            now = self.history.now
            self.history.size.versions.append(Version(self.image.size, now, now, now, now))
            self.size_failed = False

    async def close(self) -> None:
        began = self.history.tick()
        await self.image.close()
        self._flushed(began)

    async def write_back(self) -> None:
        """What the commit timer does."""
        await self.image.write_back()

    async def clean(self) -> None:
        """What the timer does when the image has been idle."""
        await self.image.clean()

    async def read(self, offset: int, size: int) -> None:
        """Read whole sectors and compare: each is a version visible meanwhile, or, byte by byte, a mixture of them."""
        since = self.history.tick()
        data = bytes(await self.image.read(offset, size))
        until = self.history.tick()
        for position in range(0, len(data) // SECTOR * SECTOR, SECTOR):
            number = (offset + position) // SECTOR
            found = data[position : position + SECTOR]
            possible = self.history.sector(number).visible(since, until)
            if found in possible:
                continue
            assert all(any(byte == value[index] for value in possible) for index, byte in enumerate(found)), (
                f"sector {number} reads as {found[:32]!r}, not as one of {[value[:32] for value in possible]}"
            )

    async def do_something(self, rnd: random.Random, size: int) -> None:
        """A random operation on whole sectors below `size`: half of them writes."""
        sectors = rnd.choice([1, 2, 8, 8, 13, 24])
        offset = rnd.randrange(size // SECTOR - sectors) * SECTOR
        if rnd.random() < 0.3:
            offset -= offset % self.cluster_size
        length = sectors * SECTOR
        choice = rnd.random()
        if choice < 0.45:
            await self.write(offset, length)
        elif choice < 0.5:
            await self.write(offset, length, data=bytes(length))
        elif choice < 0.6:
            await self.zero(offset, length)
        elif choice < 0.7:
            await self.discard(offset, length)
        elif choice < 0.78:
            await self.flush()
        elif choice < 0.85:
            await self.write_back()
        else:
            await self.read(offset, length)
