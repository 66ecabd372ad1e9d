"""How a job is paused, slowed down, ended and made to give way. Time is trio's, and passes at once."""

from __future__ import annotations

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
        seen = []
        async with trio.open_nursery() as nursery:

            async def work() -> None:
                await job.run(control)
                await trio.sleep(5)
                nursery.cancel_scope.cancel()

            nursery.start_soon(work)
            async for progress in control.watch(0.25):
                seen.append(progress.done // MIB)
        assert seen[0] == 0
        assert seen[-1] == STEPS
        assert seen == sorted(set(seen))
        assert len(seen) <= 6

    run(main)


def test_percentages() -> None:
    assert Progress(0, 0).percentage == 100
    assert Progress(0, 8).percentage == 0
    assert Progress(2, 8).percentage == 25
