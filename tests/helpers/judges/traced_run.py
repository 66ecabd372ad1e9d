"""A traced mount as a run whose every crash is judged: the log is the order of things, its position the clock.

Conservative where calls overlap. A change may be on the disk from the moment its call began; a sync covers the changes
that had returned before it began, and holds from when it has returned. A guest's operation has begun before its call,
and has ended, or is durable, after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qedfuse.sizes import round_up
from tests.helpers.doubles.crash import Change, CrashPoint, CrashStorage
from tests.helpers.doubles.ram import RamFile
from tests.helpers.images.images import TINY
from tests.helpers.judges.history import SECTOR, History, Version
from tests.helpers.judges.strace_log import Call, Event
from tests.helpers.judges.survival import Run
from tests.helpers.mounts.traced import Traced


@dataclass
class _Moment:
    """After which other states are possible: a change has begun (`change`), or these have become durable."""

    when: int
    change: int | None = None
    durable: set[int] = field(default_factory=set)


class TracedStorage(CrashStorage):
    """The image's part of a log; `file` is the image before it."""

    def __init__(self, file: RamFile, history: History) -> None:
        super().__init__("image", file, history)
        self._changes: list[Change] = []
        self._moments: list[_Moment] = []
        self._running: dict[Call, int] = {}  # changes that have not returned, by their place in the list
        self._syncs: dict[Call, set[int]] = {}  # what they cover

    def note(self, event: Event) -> None:
        call, now = event.call, self.clock.tick()
        if call.kind == "synced":
            if event.ended:
                self._moments.append(_Moment(now, durable=self._syncs.pop(call)))
            else:
                self._syncs[call] = set(range(len(self._changes))).difference(self._running.values())
        elif event.ended:
            self._changes[self._running.pop(call)].apply(self.file)
        else:
            for other in self._running:
                assert not _disturb(call, other) and not _disturb(other, call), f"who was first, {call} or {other}?"
            self._running[call] = len(self._changes)
            self._moments.append(_Moment(now, change=len(self._changes)))
            self._changes.append(Change(now, call.kind, call.offset, call.data, call.size))

    def crash_points(self) -> Iterator[CrashPoint]:
        base = self.start.fork()
        pending: dict[int, Change] = {}
        whens = [moment.when - 1 for moment in self._moments] + [self.clock.now]
        yield CrashPoint(whens[0], base.fork(), [])
        for moment, until in zip(self._moments, whens[1:], strict=True):
            if moment.change is not None:
                pending[moment.change] = self._changes[moment.change]
            for number in sorted(moment.durable & pending.keys()):
                pending.pop(number).apply(base)
            yield CrashPoint(until, base.fork(), list(pending.values()))


def _disturb(call: Call, other: Call) -> bool:
    """Whether it matters which of two changes comes first."""
    end, other_end = (each.offset + (len(each.data) or each.size) for each in (call, other))
    if call.kind == "truncate":
        return other.kind == "truncate" or other_end > call.size
    return other.kind != "truncate" and call.offset < other_end and other.offset < end


class _GuestLog:
    """The raw file's part of a log, for the history. Sizes in bytes."""

    def __init__(self, history: History, size: int) -> None:
        self._history = history
        self._size = size
        self._versions: dict[Call, list[Version[bytes]]] = {}
        self._sizes: dict[Call, tuple[Version[int], int]] = {}  # and the size before
        self._syncs: dict[Call, int] = {}  # when they began
        self._announced: list[Call] = []

    def note_journal(self, event: Event) -> None:
        """An asynchronous write is about to begin, or has ended."""
        call = event.call
        if call.kind == "write" and not event.ended:
            self._announced.append(call)
            self._begin(call)
        elif call.kind == "truncate" and event.ended:
            self._end(self._announced[call.size])

    def note(self, event: Event) -> None:
        (self._end if event.ended else self._begin)(event.call)

    def _begin(self, call: Call) -> None:
        history = self._history
        if call.kind == "synced":
            self._syncs[call] = history.tick()
            return
        end = call.offset + len(call.data)
        if call.kind == "truncate" or end > self._size:
            size = call.size if call.kind == "truncate" else round_up(end, SECTOR)
            self._sizes[call] = history.begin_size(size), self._size
            self._size = size
        if call.kind != "truncate":
            self._versions[call] = history.begin(call.offset, call.data or bytes(call.size))

    def _end(self, call: Call) -> None:
        if call.kind == "synced":
            self._history.flushed(self._syncs.pop(call))
            return
        self._history.end(self._versions.pop(call, []))
        if call in self._sizes:
            version, before = self._sizes.pop(call)
            if version.value < before:
                self._history.end_shrink(version, before)
            else:
                self._history.end([version])


def run_of(traced: Traced, events: list[Event] | None = None) -> Run:
    """`events`: others than those that happened. Fails if the log does not lead to the file that was found."""
    history = History(traced.flat)
    storage = TracedStorage(traced.chain.file.fork(), history)
    guest = _GuestLog(history, len(traced.flat))
    listeners = {traced.image: storage.note, traced.raw: guest.note, traced.journal: guest.note_journal}
    for event in events if events is not None else traced.events:
        listeners[event.call.path](event)
    if events is None:
        found = storage.file.read(0, storage.file.size)
        assert found == traced.after, "something changed the image and is not in the log"
    # All that the guest did has ended long before: the mount's end makes it durable.
    history.flushed(history.tick())
    run = Run(traced.chain, history, storage, TINY)
    run.watch()
    return run
