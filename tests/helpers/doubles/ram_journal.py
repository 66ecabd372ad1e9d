"""The journal of a conversion in place, in memory, and what a crash could leave of it."""

from __future__ import annotations

from qedfuse.chain.unfinished import Unfinished
from tests.helpers.judges.history import Clock


class RamJournal:
    """See `apply.JournalStore`. Each value goes the way through its bytes. `values`: since when, by the clock."""

    def __init__(self, clock: Clock, value: Unfinished | None = None) -> None:
        self._clock = clock
        self.values: list[tuple[int, Unfinished | None]] = [(0, value)]

    def read(self) -> Unfinished | None:
        return self.values[-1][1]

    def write(self, unfinished: Unfinished) -> None:
        self._set(Unfinished.decode(unfinished.encode(), "journal"))

    def remove(self) -> None:
        self._set(None)

    def _set(self, value: Unfinished | None) -> None:
        self.values.append((self._clock.tick(), value))

    def between(self, since: int, until: int) -> list[Unfinished | None]:
        """The values that it had at any time from one moment to another."""
        before = [value for when, value in self.values if when <= since]
        return [before[-1], *(value for when, value in self.values if since < when <= until)]
