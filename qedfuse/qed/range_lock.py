"""Locks on ranges of guest clusters, shared or exclusive, granted in the order of asking.

A task that waits (for a disk, a table page, a backing file) between looking a cluster up and using it holds the lock:
shared to read, exclusive to allocate, free or resize. Work that is done inline, without an await, needs none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qedfuse.host.waiting import Event, new_event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

#: Past every cluster.
FOREVER = 1 << 62


class _Claim:
    __slots__ = ("end", "exclusive", "granted", "start")

    def __init__(self, start: int, end: int, exclusive: bool) -> None:
        self.start = start
        self.end = end
        self.exclusive = exclusive
        self.granted: Event | None = None

    def conflicts(self, other: _Claim) -> bool:
        return (self.exclusive or other.exclusive) and self.start < other.end and other.start < self.end


class RangeLock:
    """A fair lock over [start, end) ranges: a claim waits for every conflicting claim made before it."""

    def __init__(self) -> None:
        self._claims: list[_Claim] = []  # held and waiting, in the order of asking

    def __bool__(self) -> bool:
        """Whether any range is held or waited for."""
        return bool(self._claims)

    @asynccontextmanager
    async def hold(self, start: int, end: int, exclusive: bool) -> AsyncIterator[None]:
        """Hold [start, end) for the block. Cancelled while waiting: the claim is withdrawn."""
        claim = _Claim(start, end, exclusive)
        self._claims.append(claim)
        try:
            if any(other.conflicts(claim) for other in self._before(claim)):
                claim.granted = new_event()
                await claim.granted.wait()
            yield
        finally:
            self._claims.remove(claim)
            self._wake()

    def _before(self, claim: _Claim) -> Iterator[_Claim]:
        for other in self._claims:
            if other is claim:
                return
            yield other

    def _wake(self) -> None:
        for claim in self._claims:
            waiting = claim.granted
            if waiting is None or waiting.is_set():
                continue
            if not any(other.conflicts(claim) for other in self._before(claim)):
                waiting.set()
