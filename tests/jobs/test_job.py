"""How a job is paused, slowed down, ended and made to give way. Time is trio's, and passes at once."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from qedfuse.jobs.job import Job, JobCancelled, JobControl
from qedfuse.progress import Progress

MIB = 1 << 20
STEPS = 10


class Copy:
    """A job of ten steps, a MiB and a tenth of a second each."""

    kind = "copy"

    def __init__(self) -> None:
        self.steps = 0

    async def run(self, control: JobControl) -> None:
        while self.steps < STEPS:
            await trio.sleep(0.1)
            self.steps += 1
            control.report(self.steps * MIB, STEPS * MIB)
            await control.step(MIB)


def run(body: Callable[[], Awaitable[None]]) -> None:
    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))


def seconds(control: Callable[[], JobControl]) -> float:
    """How long the job takes."""
    took = 0.0

    async def main() -> None:
        nonlocal took
        job: Job = Copy()
        start = trio.current_time()
        await job.run(control())
        took = trio.current_time() - start

    run(main)
    return took


def test_alone_it_is_not_held_up() -> None:
    assert seconds(JobControl) == pytest.approx(1.0)
    assert seconds(lambda: JobControl(guests=lambda: 7)) == pytest.approx(1.0)  # they ask for nothing


def test_the_rate_is_kept() -> None:
    assert seconds(lambda: JobControl(rate=5 * MIB)) == pytest.approx(2.0, abs=0.11)
    assert seconds(lambda: JobControl(rate=MIB)) == pytest.approx(10.0, abs=0.11)
    assert seconds(lambda: JobControl(rate=1000 * MIB)) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(("rate", "wanted"), [(None, 0.9), (10 * MIB, 0.9), (5 * MIB, 1.8)])
def test_a_changed_rate_holds_at_once(rate: int | None, wanted: float) -> None:
    """The job waits for its first step's debt, which would last for a day."""

    async def main() -> None:
        job, control = Copy(), JobControl(rate=MIB // 86400)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run, control)
            await trio.sleep(100)
            assert job.steps == 1
            control.rate = rate
            assert control.rate == rate
            start = trio.current_time()
        assert trio.current_time() - start == pytest.approx(wanted, abs=0.01)

    run(main)


def test_a_changed_rate_holds_for_the_step_that_goes_on() -> None:
    async def main() -> None:
        job, control = Copy(), JobControl()
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run, control)
            await trio.sleep(0.55)
            control.rate = MIB
        assert trio.current_time() - start == pytest.approx(0.5 + 5)

    run(main)


def test_the_same_rate_again_forgives_no_debt() -> None:
    async def main() -> None:
        control = JobControl(rate=MIB)
        start = trio.current_time()

        async def repeat() -> None:
            while True:
                await trio.sleep(0.05)
                control.rate = MIB

        async with trio.open_nursery() as nursery:
            nursery.start_soon(repeat)
            await control.step(5 * MIB)
            nursery.cancel_scope.cancel()
        assert trio.current_time() - start == pytest.approx(5.0)

    run(main)


def test_it_gives_way_to_guests() -> None:
    asked = 0

    def guests() -> int:
        nonlocal asked
        asked += 1
        return asked

    assert seconds(lambda: JobControl(guests=guests)) == pytest.approx(2.0, abs=0.11)


def test_it_is_paused_and_goes_on() -> None:
    async def main() -> None:
        job, control = Copy(), JobControl()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run, control)
            await trio.sleep(0.35)
            control.pause()
            assert control.paused
            await trio.sleep(100)
            assert job.steps == 4
            control.resume()
            start = trio.current_time()
        assert job.steps == STEPS
        assert trio.current_time() - start == pytest.approx(0.6)

    run(main)


@pytest.mark.parametrize("rate", [None, 5 * MIB], ids=["gives way", "rate"])
def test_a_pause_that_ends_within_a_step_changes_nothing(rate: int | None) -> None:
    """The step counts from where it began: it is as long as ever."""

    async def main() -> None:
        asked = itertools.count()
        control = JobControl(rate=rate, guests=None if rate else lambda: next(asked))
        await control.step(0)
        start = trio.current_time()
        for _ in range(STEPS):
            await trio.sleep(0.05)
            control.pause()
            control.resume()
            await trio.sleep(0.05)
            await control.step(MIB)
        assert trio.current_time() - start == pytest.approx(2.0)

    run(main)


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("rate", [None, 10])
def test_it_ends_at_the_end_of_its_step(paused: bool, rate: int | None) -> None:
    async def main() -> None:
        job, control, ended = Copy(), JobControl(rate=rate), trio.Event()

        async def work() -> None:
            with pytest.raises(JobCancelled):
                await job.run(control)
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await trio.sleep(0.15)
            if paused:
                control.pause()
                await trio.sleep(1)
            control.cancel()
            with trio.fail_after(0.2):
                await ended.wait()
        assert job.steps < STEPS

    run(main)


def test_a_step_lets_cancellation_in() -> None:
    async def main() -> None:
        control = JobControl()
        control.pause()
        with trio.move_on_after(1) as scope:
            await control.step(1)
        assert scope.cancelled_caught

    run(main)


def test_its_progress_is_watched() -> None:
    async def main() -> None:
        job, control = Copy(), JobControl()
        assert control.progress is None
        seen = []
        async with trio.open_nursery() as nursery:

            async def work() -> None:
                await job.run(control)
                await trio.sleep(5)
                nursery.cancel_scope.cancel()

            nursery.start_soon(work)
            async for progress in control.watch(0.25):
                seen.append(progress.done // MIB)
        assert seen[0] == 1, "before the first report there is nothing to tell"
        assert seen[-1] == STEPS
        assert seen == sorted(set(seen))
        assert len(seen) <= 6

    run(main)


def test_percentages() -> None:
    assert Progress(0, 0).percentage == 100
    assert Progress(0, 8).percentage == 0
    assert Progress(2, 8).percentage == 25
