"""Every crash of a conversion in place: the file reads as before, as the old image or as the new one, and from there
the same command finishes it, and --undo takes it back; each of which may crash, too.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qedfuse.chain.unfinished import Step, Unfinished, UnfinishedError
from qedfuse.qed.header import MAGIC
from qedfuse.tools.in_place.apply import InPlace
from qedfuse.tools.in_place.plan import Converter, Wanted
from tests.helpers.doubles.crash import CrashStorage
from tests.helpers.doubles.ram import RamFile
from tests.helpers.doubles.ram_journal import RamJournal
from tests.helpers.images.images import Chain, assert_sound, contents, dump
from tests.helpers.judges.history import Clock
from tests.helpers.qemu.cli import qemu_img

Deed = Callable[[InPlace, Unfinished | None], Awaitable[None]]


@dataclass(frozen=True)
class State:
    """What a crash has left: the file, and its journal."""

    file: RamFile
    journal: Unfinished | None

    def key(self) -> object:
        return self.file.key(), self.journal


@dataclass
class Case:
    """A conversion of `old`, which reads as `flat`. `exact`: taken back, it is the same bytes."""

    converter: Converter
    source: str
    target: str
    old: RamFile
    flat: bytes
    wanted: Wanted = field(default_factory=Wanted)
    exact: bool = True


def silent(_done: int, _total: int) -> None:
    pass


async def again(case: Case, work: InPlace, found: Unfinished | None) -> None:
    """What the command does."""
    if found is None:
        await work.begin(case.wanted, silent)
    else:
        await work.go_on(found, case.wanted, silent)


class InPlaceCrashes:
    """The states of one case that have been judged. `samples`: of each crash point, beyond the extremes."""

    def __init__(self, case: Case, seed: int, samples: int, directory: Path | None = None) -> None:
        self.case = case
        self.finished = self.taken_back = self.qemu = 0
        self._seen: set[object] = set()
        self._random = random.Random(seed)
        self._samples = samples
        self._directory = directory

    @property
    def count(self) -> int:
        return len(self._seen)

    async def enumerate(self) -> None:
        """Judge every crash of the conversion, and some crashes of what comes after each."""
        case = self.case
        for state in await self._crashes(State(case.old, None), self._again, self._samples):
            await self._judge(state)

    async def _again(self, work: InPlace, found: Unfinished | None) -> None:
        await again(self.case, work, found)

    async def _undo(self, work: InPlace, found: Unfinished | None) -> None:
        if found is not None:
            await work.take_back(found)

    async def _crashes(self, start: State, deed: Deed, samples: int) -> list[State]:
        """What a crash in the deed may leave, and its end."""
        clock = Clock()
        storage = CrashStorage("file", start.file.fork(), clock)
        journal = RamJournal(clock, start.journal)
        work = InPlace(storage, journal, self.case.converter, self.case.source, self.case.target)
        await deed(work, start.journal)
        found: list[State] = []
        since = 0
        for number, point in enumerate(storage.crash_points()):
            until = point.when if number or not storage.log else storage.log[0].when - 1  # up to the first change
            files = [point.least(), point.most(), *(point.some_state(self._random) for _ in range(samples))]
            for value in journal.between(since, until):
                for file in files:
                    state = State(file, value)
                    if state.key() not in self._seen:
                        self._seen.add(state.key())
                        found.append(state)
            since = until
        return [*found, State(storage.file, journal.read())]

    async def _judge(self, state: State) -> None:
        """The state itself, then both ways on, each with its own crashes."""
        await self._judge_content(state)
        deeds = [self._again]
        if state.journal is not None and state.journal.step is not Step.FINISH:
            deeds.append(self._undo)
        elif state.journal is not None:
            await self._judge_refused(state)
        for deed in deeds:
            if deed == self._again and state.journal is None and not self._is_old(state):
                continue  # it is done
            last = state
            for after in await self._crashes(state, deed, 1):
                await self._judge_content(after)
                last = after
            assert last.journal is None, "the journal is left"
            assert self._is_old(last) == (deed == self._undo), "it is not what was asked for"

    def _is_old(self, state: State) -> bool:
        return _is_qed(state.file) == (self.case.source == "qed")

    async def _judge_refused(self, state: State) -> None:
        file = state.file.fork()
        storage = CrashStorage("file", file, Clock())
        work = InPlace(
            storage, RamJournal(Clock(), state.journal), self.case.converter, self.case.source, self.case.target
        )
        assert state.journal is not None
        with pytest.raises(UnfinishedError):
            await work.take_back(state.journal)
        assert file.key() == state.file.key()

    async def _judge_content(self, state: State) -> None:
        """It reads as it must, by its first sector; without a journal it is the old image, or the new one, whole."""
        case, file, journal = self.case, state.file, state.journal
        is_old = self._is_old(state)
        if journal is not None and journal.step is not Step.SWITCH:
            assert is_old == (journal.step is Step.TAIL)
        if _is_qed(file):
            await assert_sound(file, leaks=journal is not None or is_old)
            assert await contents(Chain(file, [])) == case.flat, "the qed image reads otherwise"
        else:
            assert file.read(0, len(case.flat)) == case.flat, "the raw disk reads otherwise"
            assert journal is not None or file.size == len(case.flat), "the raw disk is too long"
        if journal is None and is_old:
            self.taken_back += 1
            if case.exact:
                assert (file.size, file.read(0, file.size)) == (case.old.size, case.old.read(0, case.old.size))
        elif journal is None:
            self.finished += 1
            if self._directory is not None and self._random.random() < 0.05:
                self._ask_qemu(file, self._directory)

    def _ask_qemu(self, file: RamFile, directory: Path) -> None:
        self.qemu += 1
        (directory / "flat").write_bytes(self.case.flat)
        image = dump(file, directory / "image")
        if self.case.target == "qed":
            qemu_img("check", "-f", "qed", image)
        qemu_img("compare", "-f", self.case.target, "-F", "raw", image, directory / "flat")


def _is_qed(file: RamFile) -> bool:
    return file.read(0, len(MAGIC)) == MAGIC
