"""Where the engine waits: with trio where there are other tasks, inline in a command that has none, or not at all where
its system calls are taken one by one.

A walk over the tables, and a commit, wait for two things: a system call in a worker thread, and their turn after others
had theirs. Under `run_blocking` the one is made inline and the other is nothing, so no event loop is needed:
loading trio takes longer than checking most images. Under a `Stepper` (`stepping.py`) the call is given to its driver.
"""

from __future__ import annotations

import signal
import threading
import time
import types
import warnings
from collections.abc import Callable, Coroutine, Generator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from enum import Enum, auto
from types import FrameType
from typing import Any, NoReturn, Protocol, TypeVar

from qedfuse.host.host_call import HostCall

T = TypeVar("T")


class Way(Enum):
    """How what is here waits in this context."""

    TRIO = auto()
    BLOCKING = auto()
    STEPPED = auto()


way = ContextVar("way", default=Way.TRIO)
#: Under `run_blocking`: what is done at each checkpoint.
_at_checkpoint: ContextVar[Callable[[], None] | None] = ContextVar("_at_checkpoint", default=None)


class NeedsEventLoopError(Exception):
    """What was asked for cannot be done under `run_blocking`. Nothing has been done."""


class Event(Protocol):
    """What tasks wait for until one of them sets it, as trio has it."""

    def set(self) -> object: ...
    def is_set(self) -> bool: ...
    async def wait(self) -> None: ...


class _Never:
    """An event for which nothing else waits."""

    def set(self) -> None:
        pass

    def is_set(self) -> bool:
        return False

    async def wait(self) -> None:
        raise AssertionError("there is no other task")


def new_event() -> Event:
    if way.get() is Way.BLOCKING:
        return _Never()
    import trio

    return trio.Event()


def shielded() -> AbstractContextManager[object]:
    """For a block that is carried out whatever is cancelled."""
    if way.get() is not Way.TRIO:
        return nullcontext()
    import trio

    return trio.CancelScope(shield=True)


def run_blocking(coroutine: Coroutine[Any, Any, T], at_checkpoint: Callable[[], None] | None = None) -> T:
    """Run a coroutine that waits for nothing but what is here. Returns and raises what it does. `at_checkpoint` is
    called at each checkpoint, and ends the coroutine by raising."""
    token = way.set(Way.BLOCKING)
    check = _at_checkpoint.set(at_checkpoint)
    main = threading.current_thread() is threading.main_thread()
    guard = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if guard:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        coroutine.close()
        way.reset(token)
        _at_checkpoint.reset(check)
        if guard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    raise RuntimeError("a coroutine needs an event loop")


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """As Python's own, but it may come between a coroutine's making and its await: no warning of that."""
    warnings.simplefilter("ignore", RuntimeWarning)
    raise KeyboardInterrupt


@types.coroutine
def _give_out(call: HostCall) -> Generator[HostCall, Any, Any]:
    return (yield call)


async def in_thread(call: HostCall) -> Any:
    """Make a system call in a worker thread. Not abandoned when cancelled: its buffers are in use until it ends."""
    current = way.get()
    if current is Way.BLOCKING:
        return call()
    if current is Way.STEPPED:
        return await _give_out(call)
    from qedfuse.host.offload import offload

    return await offload(call)


def in_background(call: Callable[[], object]) -> None:
    """See `offload.in_background`. Under `run_blocking` nothing is done that is not waited for."""
    if way.get() is not Way.BLOCKING:
        from qedfuse.host.offload import in_background as put

        put(call)


async def checkpoint() -> None:
    """Let other tasks run, and cancellation in."""
    current = way.get()
    if current is Way.TRIO:
        import trio

        await trio.lowlevel.checkpoint()
    elif current is Way.BLOCKING and (check := _at_checkpoint.get()) is not None:
        check()


#: Seconds of work after which other tasks have their turn.
_BREATH = 0.005


class Breather:
    """Lets other tasks run, and cancellation in, every few milliseconds. One for a whole job, however many loops."""

    def __init__(self) -> None:
        self._due = time.monotonic() + _BREATH

    async def __call__(self) -> None:
        if time.monotonic() >= self._due:
            await checkpoint()
            self._due = time.monotonic() + _BREATH
