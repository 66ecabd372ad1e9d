"""The commits that nobody waits for: what becomes of their errors, and what works after a close."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.qed.commit_timer import COMMIT_DELAY
from tests.helpers.doubles.faults import Fault, FaultStorage
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.images.images import TINY, assert_sound, new_chain, open_chain
from tests.helpers.judges.expect import raises_errno
from tests.helpers.judges.history import SECTOR
from tests.helpers.judges.survival import raw_below
from tests.helpers.judges.trials import StubbornGuest, Trial

CLUSTER = 4096
SIZE = 12 * CLUSTER + 3 * SECTOR


async def with_timer(
    fault_of: Callable[[FaultStorage], Fault], backing: bool, end: Callable[[StubbornGuest], Awaitable[None]]
) -> tuple[Trial, StubbornGuest]:
    """One write that nobody flushes; a call of the timer's commit fails; then `end`."""
    below, flat = raw_below(7 * CLUSTER) if backing else ([], b"")
    trial = Trial(await new_chain(SIZE, TINY, below), flat[:SIZE].ljust(SIZE, b"\0"), None)
    guest = await trial.open()
    assert guest
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.image.run_background)
        await guest.write(CLUSTER, SECTOR)
        trial.storage.fault = fault_of(trial.storage)
        await trio.sleep(COMMIT_DELAY * 1.5)
        assert trial.storage.fault.hit
        await end(guest)
        await trio.sleep(20 * COMMIT_DELAY)  # the timer may do what it wants: it must not fall over
        nursery.cancel_scope.cancel()
    return trial, guest


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_timer_survives_a_full_disk(backing: bool) -> None:
    """The commit is tried again, with success; the flush has nothing to complain of."""

    async def main() -> None:
        now = lambda storage: Fault(len(storage.calls), errno.ENOSPC)  # noqa: E731
        trial, guest = await with_timer(now, backing, StubbornGuest.flush)
        assert not trial.errors
        assert not guest.image.header.needs_check
        await guest.close()
        assert not trial.errors
        await assert_sound(trial.storage.file)

    run_seeded(1, main)


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize("end", [StubbornGuest.flush, StubbornGuest.close], ids=["flush", "close"])
def test_timer_whose_sync_fails(
    backing: bool, end: Callable[[StubbornGuest], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody was there to be told: the next flush or close says it, and it stays said."""

    async def main() -> None:
        trial, guest = await with_timer(NextSync, backing, end)
        assert [error.errno for error in trial.errors] == [errno.EIO]
        image = guest.image
        uses: list[Callable[[], Awaitable[object]]] = [
            image.flush, lambda: image.write(0, b"x"), lambda: image.zero(0, CLUSTER),
            lambda: image.discard(0, CLUSTER), lambda: image.resize(CLUSTER), lambda: image.resize(1 << 20),
        ]  # fmt: skip
        if end is StubbornGuest.flush:
            for use in uses:
                with raises_errno(errno.EIO):
                    await use()
            await image.read(0, 4 * CLUSTER)
            with raises_errno(errno.EIO):
                await image.close()
        await image.close()  # the second time there is nothing left to do
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
