"""A command's work that a signal ends: it is cancelled, cleans up, and only then the command ends."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from qedfuse.host.signals import ending_signals

T = TypeVar("T")


async def until_signal(
    job: Callable[[], Awaitable[T]], explain: AbstractContextManager[None]
) -> T | signal.Signals | None:
    """The job's result, or the signal that ended it. `explain` is around the job: it sees its errors as they are."""
    import trio

    outcome: T | signal.Signals | None = None
    with trio.open_signal_receiver(*ending_signals()) as signals:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def wait_for_signal() -> None:
                nonlocal outcome
                async for number in signals:
                    outcome = signal.Signals(number)
                    nursery.cancel_scope.cancel()

            with explain:
                outcome = await job()
            nursery.cancel_scope.cancel()
    return outcome
