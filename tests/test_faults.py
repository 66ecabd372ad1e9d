"""Every storage call of every scenario fails once: the caller learns it, nothing else breaks, and no flush lies."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse import commit
from qedfuse.commit import COMMIT_DELAY
from qedfuse.pages import PagePool
from tests.helpers.expect import raises_errno
from tests.helpers.faults import Fault, FaultStorage
from tests.helpers.history import SECTOR, Guest, History
from tests.helpers.images import TINY, Chain, assert_sound, contents, new_chain, open_chain, read_header
from tests.helpers.ram import Chaos
from tests.helpers.schedule import run_seeded
from tests.helpers.survival import Run, raw_below

CLUSTER = 4096
SIZE = 12 * CLUSTER + 3 * SECTOR
Step = Callable[[Guest], Awaitable[None]]
#: One page: nearly every look-up reads a table.
POOL = PagePool(capacity=1)


def write(offset: int, size: int) -> Step:
    return lambda guest: guest.write(offset, size)


def zero(offset: int, size: int) -> Step:
    return lambda guest: guest.zero(offset, size)


def discard(offset: int, size: int) -> Step:
    return lambda guest: guest.discard(offset, size)


def resize(size: int) -> Step:
    return lambda guest: guest.resize(size)


def read(offset: int, size: int) -> Step:
    return lambda guest: guest.read(offset, size)


flush: Step = Guest.flush
write_back: Step = Guest.write_back
clean: Step = Guest.clean

SCENARIOS: dict[str, list[Step]] = {
    "allocate": [
        write(0, SECTOR), flush, write(SECTOR, SECTOR), write(2 * CLUSTER - SECTOR, 2 * SECTOR), write_back,
        write(5 * CLUSTER, CLUSTER), flush, read(0, 6 * CLUSTER), write(2 * CLUSTER, SECTOR), flush,
    ],
    "zero and reuse": [
        write(0, 3 * CLUSTER), flush, zero(SECTOR, CLUSTER), discard(2 * CLUSTER, CLUSTER), flush, flush,
        write(7 * CLUSTER, SECTOR), write_back, read(6 * CLUSTER, 2 * CLUSTER), discard(0, CLUSTER), write_back,
        write(9 * CLUSTER + SECTOR, SECTOR), flush, write(0, SECTOR), flush,
    ],
    "resize": [
        write(4 * CLUSTER, CLUSTER), write(9 * CLUSTER, CLUSTER), flush, resize(4 * CLUSTER + SECTOR),
        write(CLUSTER, SECTOR), resize(10 * CLUSTER), flush, write(9 * CLUSTER, SECTOR),
        write(14 * CLUSTER + SECTOR, SECTOR), flush, resize(8 * CLUSTER), write(7 * CLUSTER, SECTOR), flush,
        read(0, 8 * CLUSTER),
    ],
    "clean": [
        write(0, SECTOR), clean, write(CLUSTER, SECTOR), write_back, write(2 * CLUSTER, SECTOR), clean,
        write(3 * CLUSTER, SECTOR), write_back, write(4 * CLUSTER, SECTOR), flush, clean,
    ],
}  # fmt: skip
BELOW = {"alone": 0, "shorter": 7 * CLUSTER + SECTOR, "longer": 30 * CLUSTER}
FAULTS = [(errno.EIO, "before"), (errno.ENOSPC, "half"), (errno.EIO, "after"), (errno.ENOSPC, "before")]


@pytest.fixture(autouse=True)
def growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file grows often."""
    monkeypatch.setattr(commit, "_GROW_CLUSTERS", 0)


class Trial:
    """One run of a scenario with one fault."""

    def __init__(self, chain: Chain, flat: bytes, fault: Fault | None) -> None:
        self.history = History(flat[:SIZE].ljust(SIZE, b"\0"))
        self.chain = chain
        self.fault = fault
        chaos = Chaos(1, refuse=0.5, yields=0, split=0)
        self.storage = FaultStorage("image", chain.file, self.history, fault, chaos=chaos)
        self.errors: list[OSError] = []
        self.lies: list[str] = []
        self.close_failed = False
        self.guest: Guest | None = None

    async def run(self, steps: Sequence[Step]) -> None:
        try:
            image = await open_chain(self.chain, self.storage, pool=POOL)
        except OSError as error:
            self.errors.append(error)
            await self.storage.close()
            return
        self.guest = Guest(image, self.history, CLUSTER)
        for step in steps:
            await self.step(step)
        await self.step(Guest.close)
        assert self.storage.closed

    async def step(self, step: Step) -> None:
        assert self.guest
        failed = self.guest.image.failed
        try:
            await step(self.guest)
        except OSError as error:
            self.errors.append(error)
            self.close_failed = step is Guest.close
        else:
            if failed and step in (flush, Guest.close):
                self.lies.append(f"{step} succeeded after a failed sync")

    async def judge(self, rnd: random.Random, *, shared: bool = False) -> None:
        """`shared`: several tasks may have waited for the call that failed."""
        fault, storage = self.fault, self.storage
        assert fault and fault.hit
        assert not self.lies, self.lies
        sync_failed = fault.hit == "sync"
        expected = {fault.errno} | ({errno.EIO} if sync_failed else set())
        assert all(error.errno in expected for error in self.errors), self.errors
        if fault.hit != "punch":
            assert self.errors, "nobody was told"
        if not sync_failed:
            assert shared or len(self.errors) <= 1, f"one fault, but these failed: {self.errors}"
        else:
            assert "sync" not in storage.calls[fault.call + 1 :], "a second sync cannot make good for a failed one"
        if self.guest and not sync_failed:
            assert not self.guest.image.failed
            assert not read_header(storage.file).needs_check or self.errors
            # What could not be punched is a leak, and what a close that failed did not get to.
            await assert_sound(storage.file, leaks=fault.hit == "punch" or self.close_failed)
            now = self.history.tick()
            data = await contents(self.chain)
            assert len(data) == self.guest.image.size
            for number in range(len(data) // SECTOR):
                found = data[number * SECTOR :][:SECTOR]
                assert found in self.history.sector(number).visible(now, now), f"sector {number}: {found[:16]!r}"
        # The worst that can come now, or could have come at any time before.
        run = Run(self.chain, self.history, storage, TINY)
        run.watch()
        if fault.hit == "header" and fault.when == "after":  # what the file says is not what memory says
            await run.enumerate(rnd, complete=64, samples=100)
            return
        points = list(storage.crash_points())
        for point in [points[-1]] * 3 + rnd.choices(points, k=2):
            await run.survive(point.some_state(rnd), point, thorough=rnd.random() < 0.2)


@pytest.mark.parametrize("backing", BELOW)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_call_fails_once(name: str, backing: str) -> None:
    below, flat = raw_below(BELOW[backing]) if BELOW[backing] else ([], b"")
    rnd = random.Random(1)

    async def one(fault: Fault | None) -> Trial:
        chain = await new_chain(SIZE, TINY, below)
        trial = Trial(chain, flat, fault)
        await trial.run(SCENARIOS[name])
        if fault:
            try:
                await trial.judge(rnd)
            except AssertionError as error:
                calls = trial.storage.calls
                error.add_note(f"{fault}; around it: {calls[max(0, fault.call - 4) : fault.call + 5]}")
                raise
        return trial

    fine = trio.run(one, None)
    assert not fine.errors
    assert {"read", "write", "sync", "truncate"} <= set(fine.storage.calls)
    for call in range(len(fine.storage.calls)):
        for code, when in FAULTS:
            trio.run(one, Fault(call, code, when))
    assert POOL.in_use == 0


@pytest.mark.parametrize("backing", ["alone", "shorter"])
def test_a_fault_among_tasks(backing: str) -> None:
    """Four tasks at once, one call fails: those that are told go on, and nobody else's data suffers."""
    below, flat = raw_below(BELOW[backing]) if BELOW[backing] else ([], b"")
    told = 0

    async def main(seed: int) -> None:
        nonlocal told
        rnd = random.Random(seed)
        code, when = rnd.choice(FAULTS)
        fault = Fault(rnd.randrange(150), code, when)
        trial = Trial(await new_chain(SIZE, TINY, below), flat, fault)
        trial.storage.chaos = Chaos(seed)
        try:
            image = await open_chain(trial.chain, trial.storage, pool=POOL)
        except OSError:
            return
        trial.guest = Guest(image, trial.history, CLUSTER)

        async def task() -> None:
            for _ in range(12):
                await trial.step(lambda guest: guest.do_something(rnd, SIZE))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(task)
        await trial.step(flush)
        await trial.step(Guest.close)
        told += bool(trial.errors)
        if fault.hit:
            await trial.judge(rnd, shared=True)

    for seed in range(200):
        run_seeded(seed, main, seed)
    assert told > 50


# -- the timer's commits --------------------------------------------------------------------------------------------


async def with_timer(fault_of: Callable[[FaultStorage], Fault], backing: bool, end: Step) -> Trial:
    """One write that nobody flushes; a call of the timer's commit fails; then `end`."""
    below, flat = raw_below(7 * CLUSTER) if backing else ([], b"")
    trial = Trial(await new_chain(SIZE, TINY, below), flat, None)
    image = await open_chain(trial.chain, trial.storage)
    trial.guest = Guest(image, trial.history, CLUSTER)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.run_background)
        await trial.guest.write(CLUSTER, SECTOR)
        trial.storage.fault = fault_of(trial.storage)
        await trio.sleep(COMMIT_DELAY * 1.5)
        assert trial.storage.fault.hit
        await trial.step(end)
        await trio.sleep(20 * COMMIT_DELAY)  # the timer may do what it wants: it must not fall over
        nursery.cancel_scope.cancel()
    return trial


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_timer_survives_a_full_disk(backing: bool) -> None:
    """The commit is tried again, with success; the flush has nothing to complain of."""

    async def main() -> None:
        trial = await with_timer(lambda storage: Fault(len(storage.calls), errno.ENOSPC), backing, flush)
        assert not trial.errors
        assert trial.guest
        assert not trial.guest.image.header.needs_check
        await trial.step(Guest.close)
        assert not trial.errors
        await assert_sound(trial.storage.file)

    run_seeded(1, main)


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize("end", [flush, Guest.close], ids=["flush", "close"])
def test_timer_whose_sync_fails(backing: bool, end: Step, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody was there to be told: the next flush or close says it, and it stays said."""

    async def main() -> None:
        trial = await with_timer(NextSync, backing, end)
        assert [error.errno for error in trial.errors] == [errno.EIO]
        assert trial.guest
        for step in (flush, write(0, SECTOR), zero(0, CLUSTER), discard(0, CLUSTER), resize(CLUSTER), resize(1 << 20)):
            if end is flush:
                with raises_errno(errno.EIO):
                    await step(trial.guest)
        if end is flush:
            await trial.guest.read(0, 4 * CLUSTER)
            with raises_errno(errno.EIO):
                await trial.guest.close()
        await trial.guest.close()  # the second time there is nothing left to do
        assert trial.storage.closed and trial.storage.calls.count("sync") == 1
        assert "sync failed" in caplog.text

    run_seeded(1, main)


class NextSync(Fault):
    """Whichever call is the next sync fails."""

    def __init__(self, storage: FaultStorage) -> None:
        super().__init__(-1, errno.EIO)
        original = storage.sync

        async def sync() -> None:
            self.call = len(storage.calls)
            await original()

        storage.sync = sync  # type: ignore[method-assign]


def test_timer_after_a_failed_close() -> None:
    """A close that could not write the tables has closed the file all the same; the timer must not look for them."""

    async def main() -> None:
        trial = Trial(await new_chain(SIZE, TINY), b"", None)
        image = await open_chain(trial.chain, trial.storage)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.run_background)
            await image.write(0, b"x" * SECTOR)
            await wait_all_tasks_blocked()
            trial.storage.fault = Fault(len(trial.storage.calls), errno.ENOSPC)
            with raises_errno(errno.ENOSPC):
                await image.close()
            assert trial.storage.closed
            await trio.sleep(20)
            nursery.cancel_scope.cancel()

    run_seeded(1, main)


def test_nothing_works_after_close() -> None:
    """Late callers get an error, not somebody else's file."""

    async def main() -> None:
        trial = Trial(await new_chain(SIZE, TINY), b"", None)
        image = await open_chain(trial.chain, trial.storage)
        await image.write(0, b"x" * CLUSTER)
        await image.close()
        before = trial.storage.file.key()
        uses: list[Callable[[], Awaitable[object]]] = [
            lambda: image.write(0, b"y"), lambda: image.read(0, 1), lambda: image.zero(0, 1), lambda: image.resize(512),
        ]  # fmt: skip
        for use in uses:
            with raises_errno(errno.EBADF, errno.EIO):
                await use()
        assert trial.storage.file.key() == before

    trio.run(main)
