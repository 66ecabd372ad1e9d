"""What a process's part of a file must read as: now, and after a crash of what serves the file. Pure.

The process alone writes to its part. Every change is noted before it is begun, so that one which is interrupted counts
as one that may have happened. Until a sector is known to be durable, each content that it has had since may come back.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, Protocol

SECTOR = 512
#: Bytes that say which process put them there, with which deed, and where.
UNIT = 8
#: Deeds that can be told apart of one process, and processes.
_WORKER_BITS = 4
_REMEMBERED = 5000


class Bytes(Protocol):
    """What the model is kept in: a bytearray or a map of a file."""

    def __getitem__(self, key: slice, /) -> bytes | bytearray: ...
    def __setitem__(self, key: slice, value: bytes, /) -> None: ...
    def __len__(self) -> int: ...


class Deed(NamedTuple):
    """Something that was done to a range, for the story of a sector that is wrong. `when`: time.time()."""

    number: int
    when: float
    kind: str
    offset: int
    size: int

    def __str__(self) -> str:
        second = time.strftime("%H:%M:%S", time.gmtime(self.when))
        return f"{second}.{int(self.when % 1 * 1e6):06} deed {self.number}: {self.kind} {self.offset}+{self.size}"


@dataclass
class _Change:
    """`before`: what the sectors from `first` on held. `cached`: the kernel may send a page while it is changed."""

    first: int
    before: bytes
    cached: bool


@dataclass
class _Synced:
    """The sectors [first, end) are durable as they were then."""

    first: int
    end: int


def content(worker: int, deed: int, offset: int, size: int) -> bytes:
    """Bytes for a range: nothing like them anywhere else, and none of their units is zero."""
    tag = (deed << _WORKER_BITS | worker) << 32
    first, end = offset // UNIT, -(-(offset + size) // UNIT)
    return array("Q", range(tag + first, tag + end)).tobytes()[offset % UNIT :][:size]


def describe(found: bytes | bytearray, offset: int) -> str:
    """Whose bytes these are, at a sector's `offset`: runs of units of one origin."""
    units = array("Q", bytes(found).ljust(-(-len(found) // UNIT) * UNIT, b"\0"))
    runs: list[tuple[str, int]] = []
    for number, unit in enumerate(units):
        tag, place = unit >> 32, (unit & 0xFFFFFFFF) - (offset // UNIT + number)
        worker, deed = tag & ((1 << _WORKER_BITS) - 1), tag >> _WORKER_BITS
        if unit == 0:
            name = "zeroes"
        elif abs(place) < 1 << 26:
            name = f"worker {worker}'s deed {deed}" + (f" {place * UNIT:+} bytes away" if place else "")
        else:
            name = f"others (such as {unit.to_bytes(UNIT, 'little').hex()})"
        if runs and runs[-1][0].split(" (")[0] == name.split(" (")[0]:
            runs[-1] = (runs[-1][0], runs[-1][1] + UNIT)
        else:
            runs.append((name, UNIT))
    return ", ".join(f"{size} of {name}" for name, size in runs[:8]) + (" ..." if len(runs) > 8 else "")


class Shadow:
    """`model` holds what the whole file must read as; this process changes its own part of it alone."""

    def __init__(self, model: Bytes) -> None:
        self.model = model
        self.mixed = 0  # sectors that a crash has left as a mixture of their versions, byte by byte
        self._log: list[_Change | _Synced] = []
        self._deeds: deque[Deed] = deque(maxlen=_REMEMBERED)
        self.number = 0

    def note(self, kind: str, offset: int = 0, size: int = 0) -> int:
        """A deed that changes nothing, or is about to. Returns its number."""
        self.number += 1
        self._deeds.append(Deed(self.number, time.time(), kind, offset, size))
        return self.number

    def change(self, offset: int, data: bytes, *, cached: bool) -> None:
        """From now on the range may read as `data`; once the call has returned, it must."""
        if not data:
            return
        first, end = offset // SECTOR, -(-(offset + len(data)) // SECTOR)
        self._log.append(_Change(first, bytes(self.model[first * SECTOR : end * SECTOR]), cached))
        self.model[offset : offset + len(data)] = data

    def synced(self, offset: int | None = None, size: int = 0) -> None:
        """All that was completed so far is durable, or what was completed in the sectors that this range touches."""
        if offset is None:
            self._log.clear()
        else:
            self._log.append(_Synced(offset // SECTOR, -(-(offset + size) // SECTOR)))

    def wrong(self, offset: int, found: bytes) -> list[str]:
        """How a range that has been read differs from what it must be."""
        wanted = self.model[offset : offset + len(found)]
        if wanted == found:
            return []
        result = []
        for place in range(offset - offset % SECTOR, offset + len(found), SECTOR):
            low, high = max(place, offset), min(place + SECTOR, offset + len(found))
            if wanted[low - offset : high - offset] != found[low - offset : high - offset]:
                is_there = describe(found[low - offset : high - offset], low)
                must_be = describe(wanted[low - offset : high - offset], low)
                result.append(f"sector {place // SECTOR}: {is_there}; not {must_be}\n{self.story(place // SECTOR)}")
        return result

    def settle(self, offset: int, found: bytes) -> list[str]:
        """After a crash, a range of whole sectors reads as `found`: what of it cannot be. The rest is taken over, and
        once all ranges have been settled, `synced` begins anew."""
        choices = self._choices(offset // SECTOR, -(-(offset + len(found)) // SECTOR))
        result = []
        for place in range(offset, offset + len(found), SECTOR):
            is_there = found[place - offset : place - offset + SECTOR]
            now = bytes(self.model[place : place + SECTOR])
            if is_there == now:
                continue
            versions, cached = choices.get(place // SECTOR, ([], False))
            if is_there not in versions:
                if cached and _is_mixture(is_there, [*versions, now]):
                    self.mixed += 1
                else:
                    texts = "; ".join(describe(each, place) for each in [*versions, now])
                    story = self.story(place // SECTOR)
                    result.append(f"sector {place // SECTOR}: {describe(is_there, place)}; not one of {texts}\n{story}")
            self.model[place : place + SECTOR] = is_there
        return result

    def _choices(self, low: int, high: int) -> dict[int, tuple[list[bytes], bool]]:
        """The contents that the sectors of [low, high) had before the present one and that may come back, and whether a
        page may have been sent while it was changed."""
        result: dict[int, tuple[list[bytes], bool]] = {}
        for entry in self._log:
            if isinstance(entry, _Synced):
                for sector in range(max(low, entry.first), min(high, entry.end)):
                    result.pop(sector, None)
                continue
            for sector in range(max(low, entry.first), min(high, entry.first + len(entry.before) // SECTOR)):
                versions, cached = result.get(sector, ([], False))
                start = (sector - entry.first) * SECTOR
                versions.append(entry.before[start : start + SECTOR])
                result[sector] = versions, cached or entry.cached
        return result

    def last(self) -> str:
        """The deed that was noted last."""
        return str(self._deeds[-1]) if self._deeds else "before any deed"

    def story(self, sector: int) -> str:
        """What was last done to a sector, and when."""
        low, high = sector * SECTOR, (sector + 1) * SECTOR
        deeds = [
            deed for deed in self._deeds if deed.size == 0 or (deed.offset < high and deed.offset + deed.size > low)
        ]
        named = [deed for deed in deeds if deed.size][-8:]
        since = named[0].number if named else self.number - 5
        return "\n".join(f"    {deed}" for deed in [deed for deed in deeds if deed.number >= since][-24:])


def _is_mixture(found: bytes, versions: list[bytes]) -> bool:
    return all(any(byte == version[place] for version in versions) for place, byte in enumerate(found))
