"""Threads for looks at host names: bounded in time and number, and none of those that serve the kernel.

A name that an image or a directory gives may lead anywhere, into a file system whose server is dead, too. The kernel
does not let go of a thread that waits there, not even for SIGKILL. So it is left behind when `PATIENCE` is over, and
what it returns later is given up. While it is stuck, others are kept out of the place that it is stuck in: they fail at
once. That bounds how many get stuck, whatever is asked of a dead place.

A place is a mount's id, or whatever else names where a thread is about to look; see `enter`.
"""

from __future__ import annotations

import errno
import math
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import trio

from qedfuse.errors import QedfuseError

T = TypeVar("T")

#: Seconds that a look may take. A disk that spins up, and a network mount that is made on demand, need some.
PATIENCE = 30.0

#: Seconds for which a cancelled look is waited for.
_MOMENT = 1.0

#: Looks at a time, in one event loop.
_MOST = 512
_slots: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("_slots")

_lock = threading.Lock()
#: Places, and how many threads were left behind there.
_stuck: Counter[Hashable] = Counter()


class NoAnswerError(QedfuseError):
    """A look was given up, or not begun, as the host does not answer there."""

    default_errno = errno.ETIMEDOUT

    def __init__(self, path: str = "") -> None:
        super().__init__(path, "the host file system does not answer")


def cannot_tell(error: OSError) -> bool:
    """Whether an error says nothing of the name that was asked for: there was no answer, or no descriptor, memory or
    thread to ask with. It must not be taken for one that says what is there."""
    shortage = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
    return shortage or isinstance(error, NoAnswerError)


class _Look(Generic[T]):
    """A call in a thread, and what becomes of its outcome."""

    def __init__(self, call: Callable[[], T], discard: Callable[[T], None]) -> None:
        self.place: Hashable = None
        self.left = False
        self._begun = False
        self._call = call
        self._discard = discard
        self._stuck_in: Hashable = None
        self._result: list[T] = []
        self._error: BaseException | None = None

    @property
    def running(self) -> bool:
        return self._begun and not self._result and self._error is None

    def run(self) -> None:
        self._begun = True
        _current.set(self)
        try:
            result = self._call()
        except BaseException as error:
            self._error = error
        with _lock:
            if self._error is None:
                self._result.append(result)
            if self._stuck_in is not None:
                _stuck[self._stuck_in] -= 1
                if not _stuck[self._stuck_in]:
                    del _stuck[self._stuck_in]
            unwanted = self._give_up() if self.left else []
        for result in unwanted:
            self._discard(result)

    def take(self) -> T:
        """The outcome of a call that has returned."""
        if self._error is not None:
            raise self._error
        return self._result.pop()

    def leave(self, *, stuck: bool) -> None:
        """The outcome is wanted no longer. `stuck`: it takes too long."""
        with _lock:
            self.left = True
            if stuck and self.running and self.place is not None:
                self._stuck_in = self.place
                _stuck[self.place] += 1
            unwanted = self._give_up()
        for result in unwanted:
            self._discard(result)

    def _give_up(self) -> list[T]:
        result, self._result = self._result, []
        return result


_current: ContextVar[_Look[Any] | None] = ContextVar("_current", default=None)


def enter(place: Hashable) -> None:
    """To be called before something is asked of a place. Raises NoAnswerError if another look is stuck there, and in a
    look that was left behind."""
    current = _current.get()
    if place in _stuck or (current is not None and current.left):
        raise NoAnswerError
    if current is not None:
        current.place = place


def _slots_of_loop() -> trio.CapacityLimiter:
    try:
        return _slots.get()
    except LookupError:
        _slots.set(trio.CapacityLimiter(_MOST))
        return _slots.get()


async def abandonable(call: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
    """`call()` in a thread that is left behind when this is cancelled. Raises what `call` raises, EAGAIN if there is no
    thread to be had."""
    try:
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)
    except RuntimeError:
        raise OSError(errno.EAGAIN, "no thread to be had") from None


async def look(
    call: Callable[[], T], *, discard: Callable[[T], None] = lambda _: None, patience: float | None = None
) -> T:
    """`call()` in a thread, for up to `patience` seconds (None: `PATIENCE`). When cancelled it waits for a moment: what
    ends soon has come to its end then.

    `discard` takes a result that comes too late; it is called in any thread. Raises what `call` raises, NoAnswerError
    when it takes too long, EAGAIN if there is no thread to be had.
    """
    task: _Look[T] = _Look(call, discard)
    done = False
    try:
        with trio.move_on_after(PATIENCE if patience is None else patience) as limit:
            async with _slots_of_loop():
                await abandonable(task.run, trio.CapacityLimiter(math.inf))
            done = True
    except trio.Cancelled:
        with trio.move_on_after(_MOMENT, shield=True):
            while task.running:  # noqa: ASYNC110 (a thread that was left cannot tell)
                await trio.sleep(0.001)
        raise
    finally:
        if not done:
            task.leave(stuck=limit.cancelled_caught)
    if not done:
        raise NoAnswerError
    return task.take()
