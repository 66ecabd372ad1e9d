"""Where the engine waits: with trio for whoever runs other tasks, on the spot for a command that has none, or not at
all for whoever takes its system calls one by one.

A walk over the tables, and a commit, wait for two things: a system call in a worker thread, and their turn after others
had theirs. Under `run_blocking` the one is made on the spot and the other is nothing, so no event loop is needed:
loading trio takes longer than checking most images. A `Stepper` gives the call to its caller and goes on when it is
made: the event loop's way around costs more than a fast disk's sync.
"""

from __future__ import annotations

import functools
import signal
import threading
import time
import types
import warnings
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from enum import Enum, auto
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

from qedfuse.host.host_call import Host, HostCall

T = TypeVar("T")


class _Way(Enum):
    TRIO = auto()
    BLOCKING = auto()
    STEPPED = auto()


_way = ContextVar("_way", default=_Way.TRIO)


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing but what is here. Returns and raises what it does."""
    token = _way.set(_Way.BLOCKING)
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
        _way.reset(token)
        if guard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    raise RuntimeError("a coroutine needs an event loop")


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """As Python's own, but it may come between a coroutine's making and its await: nobody need be told of that."""
    warnings.simplefilter("ignore", RuntimeWarning)
    raise KeyboardInterrupt


class Stepper:
    """A coroutine that waits for nothing but what is here, driven from one system call to the next.

    `call` is what it waits for, None when it has ended; `advance` with what came of the call goes on to the next one
    and raises what the coroutine raises. It begins at once.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.call: HostCall | None = None
        self._coroutine = coroutine
        self._step(functools.partial(coroutine.send, None))

    def advance(self, result: object, error: BaseException | None = None) -> None:
        if error is not None:
            self._step(functools.partial(self._coroutine.throw, error))
        else:
            self._step(functools.partial(self._coroutine.send, result))

    def _step(self, go: Callable[[], Any]) -> None:
        self.call = None
        token = _way.set(_Way.STEPPED)
        try:
            call = go()
        except StopIteration:
            return
        finally:
            _way.reset(token)
        if not isinstance(call, HostCall):
            self._coroutine.close()
            raise RuntimeError("a coroutine needs an event loop")
        self.call = call


@types.coroutine
def _give_out(call: HostCall) -> Generator[HostCall, Any, Any]:
    return (yield call)


async def in_thread(host: Host, function: Callable[..., T], *args: object) -> T:
    """Make a system call in a worker thread. Not abandoned when cancelled: its buffers are in use until it ends."""
    way = _way.get()
    if way is _Way.BLOCKING:
        return function(*args)
    call = HostCall(function, *args)
    call.host = host
    if way is _Way.STEPPED:
        return cast(T, await _give_out(call))
    from qedfuse.host.offload import offload

    return cast(T, await offload(call))


def in_background(call: Callable[[], object]) -> None:
    """See `offload.in_background`; on the spot, nothing is done that nobody waits for."""
    if _way.get() is not _Way.BLOCKING:
        from qedfuse.host.offload import in_background as put

        put(call)


async def checkpoint() -> None:
    """Let other tasks run, and cancellation in."""
    if _way.get() is _Way.TRIO:
        import trio

        await trio.lowlevel.checkpoint()


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
