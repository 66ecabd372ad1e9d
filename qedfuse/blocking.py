"""Where the engine waits: with trio for whoever runs other tasks, or on the spot for a command that has none.

A walk over the tables waits for two things: a system call in a worker thread, and its turn after others had theirs.
Under `run_blocking` the one is made on the spot and the other is nothing, so no event loop is needed: loading trio
takes longer than checking most images.
"""

from __future__ import annotations

import functools
import signal
import threading
import warnings
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from types import FrameType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_alone = ContextVar("_alone", default=False)


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing but what is here. Returns and raises what it does."""
    token = _alone.set(True)
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
        _alone.reset(token)
        if guard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    raise RuntimeError("a coroutine needs an event loop")


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """As Python's own, but it may come between a coroutine's making and its await: nobody need be told of that."""
    warnings.simplefilter("ignore", RuntimeWarning)
    raise KeyboardInterrupt


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """Make a system call in a worker thread. Not abandoned when cancelled: its buffers are in use until it ends."""
    if _alone.get():
        return function(*args)
    from qedfuse.offload import offload

    return await offload(functools.partial(function, *args))


def in_background(call: Callable[[], object]) -> None:
    """See `offload.in_background`; on the spot, nothing is done that nobody waits for."""
    if not _alone.get():
        from qedfuse.offload import in_background as put

        put(call)


async def checkpoint() -> None:
    """Let other tasks run, and cancellation in."""
    if not _alone.get():
        import trio

        await trio.lowlevel.checkpoint()
