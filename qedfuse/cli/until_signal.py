"""A command's work that a signal ends: it is cancelled, cleans up, and only then the command ends."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from qedfuse.host.signals import ending_signals
from qedfuse.host.waiting import run_blocking

T = TypeVar("T")


class _EndedError(BaseException):
    """A signal has come."""


async def until_signal(
    job: Callable[[], Awaitable[T]], explain: AbstractContextManager[None]
) -> T | signal.Signals | None:
    """The job's result, or the signal that ended it. `explain` is around the job: it sees its errors as they are."""
    import logging

    import trio

    log = logging.getLogger("qedfuse")
    if not log.handlers:  # the command's one line says what has failed
        log.addHandler(logging.NullHandler())

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


def run_until_signal(
    job: Callable[[], Coroutine[Any, Any, T]], explain: AbstractContextManager[None]
) -> T | signal.Signals | None:
    """As `until_signal`, without an event loop: the job is ended at its next checkpoint. Raises NeedsEventLoopError."""
    received: list[signal.Signals] = []

    def end_if_received() -> None:
        if received:
            raise _EndedError

    before = {
        number: signal.signal(number, lambda got, _: received.append(signal.Signals(got)))
        for number in ending_signals()
    }
    try:
        with explain:
            return run_blocking(job(), end_if_received)
    except _EndedError:
        return received[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
