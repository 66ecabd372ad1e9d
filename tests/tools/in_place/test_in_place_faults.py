"""Every call of a conversion between raw and QED fails once, or is cancelled: what the message says then is true."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
import trio

from qedfuse.chain.unfinished import Step, Unfinished
from qedfuse.tools.in_place.apply import InPlace
from tests.helpers.doubles.crash import CrashStorage
from tests.helpers.doubles.faults import Fault, FaultStorage
from tests.helpers.doubles.ram import Chaos, RamFile, RamStorage
from tests.helpers.doubles.ram_journal import RamJournal
from tests.helpers.images.check_images import CLUSTER
from tests.helpers.images.images import Chain, assert_sound, contents
from tests.helpers.images.in_place_cases import back_case, in_any_order, raw_case, with_leaks, written
from tests.helpers.judges.history import Clock
from tests.helpers.judges.in_place import Case, again, silent

WAYS = {
    "read": [(errno.EIO, "before")],
    "seek": [(errno.EIO, "before")],
    "write": [(errno.EIO, "before"), (errno.ENOSPC, "half"), (errno.EIO, "after")],
    "header": [(errno.EIO, "before"), (errno.EIO, "after")],
    "truncate": [(errno.ENOSPC, "before"), (errno.EIO, "after")],
    "punch": [(errno.EIO, "before"), (errno.EIO, "half"), (errno.ENOSPC, "after")],
    "sync": [(errno.EIO, "before"), (errno.ENOSPC, "after")],
}
UNCHANGED = "file is unchanged"


class FailingJournal(RamJournal):
    """Its n-th change fails, before it is done or after that."""

    def __init__(self, call: int, when: str) -> None:
        super().__init__(Clock())
        self.call = call
        self.when = when

    def _set(self, value: Unfinished | None) -> None:
        self.call -= 1
        if self.call != -1:
            super()._set(value)
        else:
            if self.when == "after":
                super()._set(value)
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def work_on(case: Case, storage: RamStorage, journal: RamJournal) -> InPlace:
    return InPlace(storage, journal, case.converter, case.source, case.target)


async def expect_new(case: Case, storage: RamStorage, journal: RamJournal) -> None:
    assert journal.read() is None
    if case.target == "raw":
        assert storage.file.read(0, storage.file.size) == case.flat
    else:
        await assert_sound(storage.file)
        assert await contents(Chain(storage.file, [])) == case.flat


async def expect_old(case: Case, storage: RamStorage, journal: RamJournal, *, same: bool) -> None:
    """`same`: byte for byte, holes apart."""
    assert journal.read() is None
    if same:
        assert (storage.file.size, storage.file.read(0, storage.file.size)) == (
            case.old.size,
            case.old.read(0, case.old.size),
        )
    else:
        await assert_sound(storage.file, leaks=True)
        assert await contents(Chain(storage.file, [])) == case.flat


async def expect_truth(case: Case, work: InPlace, storage: RamStorage, journal: RamJournal) -> str:
    """Whatever the ending of the message says is so. Returns it."""
    ending = work.ending
    if ending == UNCHANGED:
        await expect_old(case, storage, journal, same=True)
        return ending
    found = journal.read()
    if found is not None and "--undo" in ending:
        undone = RamStorage("file", storage.file.fork())
        undone_journal = RamJournal(Clock(), found)
        await work_on(case, undone, undone_journal).take_back(found)
        await expect_old(case, undone, undone_journal, same=case.exact)
    assert ending.startswith("run the command again")
    finished = RamStorage("file", storage.file.fork())
    finished_journal = RamJournal(Clock(), found)
    if found is not None or (finished.file.read(0, 3) == b"QED") == (case.source == "qed"):
        await again(case, work_on(case, finished, finished_journal), found)
    await expect_new(case, finished, finished_journal)
    return ending


CASES: list[Callable[[], Awaitable[Case]]] = [written, in_any_order, with_leaks]


async def raw() -> Case:
    return raw_case(5 * CLUSTER + 1024)


async def back() -> Case:
    return await back_case(raw_case(5 * CLUSTER + 1024))


CASES += [raw, back]


@pytest.mark.parametrize("make", CASES)
def test_every_call_fails_once(make: Callable[[], Awaitable[Case]]) -> None:
    endings: Counter[str] = Counter()

    async def main() -> None:
        case = await make()
        whole = FaultStorage("file", case.old.fork(), Clock(), None)
        await again(case, work_on(case, whole, RamJournal(Clock())), None)
        for number, kind in enumerate(whole.calls):
            for code, when in WAYS[kind]:
                storage = FaultStorage("file", case.old.fork(), Clock(), Fault(number, code, when))
                journal = RamJournal(Clock())
                work = work_on(case, storage, journal)
                with pytest.raises(OSError) as caught:
                    await again(case, work, None)
                assert caught.value.errno in (code, errno.EIO), caught.value
                endings[await expect_truth(case, work, storage, journal)] += 1

    trio.run(main)
    print(f"figures: {endings.total()} faults: {dict(endings)}")
    assert endings[UNCHANGED] > 3 and len(endings) > 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("make", CASES)
def test_every_change_of_the_journal_fails_once(make: Callable[[], Awaitable[Case]], when: str) -> None:
    async def main() -> None:
        case = await make()
        endings = []
        for call in range(4):
            storage, journal = RamStorage("file", case.old.fork()), FailingJournal(call, when)
            work = work_on(case, storage, journal)
            with pytest.raises(OSError) as caught:
                await again(case, work, None)
            assert caught.value.errno == errno.EIO
            endings.append(await expect_truth(case, work, storage, journal))
        assert endings[0] == UNCHANGED and "--undo" not in endings[3]

    trio.run(main)


@pytest.mark.parametrize("make", CASES)
def test_cancelled_anywhere(make: Callable[[], Awaitable[Case]]) -> None:
    endings: Counter[str] = Counter()

    async def main() -> None:
        case = await make()
        checkpoints, cancelled = 0, True
        while cancelled:
            storage = RamStorage("file", case.old.fork(), chaos=Chaos(1, refuse=1, split=0))
            journal = RamJournal(Clock())
            work = work_on(case, storage, journal)
            cancelled = await cancelled_after(checkpoints, case, work)
            if cancelled:
                storage.chaos = None
                endings[await expect_truth(case, work, storage, journal)] += 1
            checkpoints += 1

    trio.run(main)
    print(f"figures: cancelled {endings.total()} times: {dict(endings)}")
    assert endings[UNCHANGED] > 3


async def cancelled_after(checkpoints: int, case: Case, work: InPlace) -> bool:
    async def count_down() -> None:
        for _ in range(checkpoints):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()

    done = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_down)
        await work.begin(case.wanted, silent)
        done = True
        nursery.cancel_scope.cancel()
    return not done


class LosingStorage(CrashStorage):
    """Its n-th sync fails, and what it was to make durable will never be, although it is what is read."""

    def __init__(self, file: RamFile, number: int) -> None:
        super().__init__("file", file, Clock())
        self.number = number

    async def sync(self) -> None:
        self.number -= 1
        if self.number != -1:
            await super().sync()
            return
        durable = max([change.begun for change in self.log if change.kind == "synced"], default=0)
        del self.log[durable:]
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("undo", [False, True], ids=["finished", "undone"])
@pytest.mark.parametrize("make", [raw, back])
def test_what_a_failed_sync_has_lost_is_written_again(make: Callable[[], Awaitable[Case]], undo: bool) -> None:
    """The switch is read as done, and is not on the disk."""

    async def main() -> None:
        case = await make()
        storage, journal = LosingStorage(case.old.fork(), 1), RamJournal(Clock())
        work = work_on(case, storage, journal)
        with pytest.raises(OSError, match="Input/output error"):
            await again(case, work, None)
        found = journal.read()
        assert found is not None and found.step is Step.SWITCH and storage.file.read(0, 512) == found.new_first
        if undo:
            await work_on(case, storage, journal).take_back(found)
            await expect_old(case, RamStorage("file", storage.crash_point_now().least()), journal, same=case.exact)
        else:
            await again(case, work_on(case, storage, journal), found)
            await expect_new(case, RamStorage("file", storage.crash_point_now().least()), journal)

    trio.run(main)


def test_what_a_failed_sync_of_taking_back_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old first sector is read, and the new one is on the disk: it is written again before the cut."""

    async def main() -> None:
        case = raw_case(5 * CLUSTER)
        storage, journal = LosingStorage(case.old.fork(), 2), RamJournal(Clock())
        with monkeypatch.context() as patch:
            patch.setattr(InPlace, "_finish", fail)
            with pytest.raises(OSError, match="stopped"):
                await again(case, work_on(case, storage, journal), None)
        for fails in (True, False):
            found = journal.read()
            assert found is not None
            try:
                await work_on(case, storage, journal).take_back(found)
                assert not fails
            except OSError:
                assert fails and storage.file.read(0, 512) == found.old_first
        await expect_old(case, RamStorage("file", storage.crash_point_now().least()), journal, same=True)

    trio.run(main)


async def fail(*_arguments: object) -> None:
    raise OSError(errno.EIO, "stopped")
