"""System calls that may wait, in a thread: what the event loop does not know of the host's disk.

trio's way to a thread and back costs 140 µs, and an fdatasync of a fast disk hardly more. So one thread of our own
takes one call at a time, and the loop waits for it, on the spot, for as long as a fast disk may take: 40 µs instead.
It waits for no longer than `PATIENCE_MS`, and not when a request of the kernel arrives (`watch`): the loop is never
away for longer than it is for a burst of the fast path. A call that takes longer, or comes while another is under way,
costs what it costs with trio.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeVar, cast

import trio

T = TypeVar("T")

#: How long the loop waits on the spot.
PATIENCE_MS = 1


class Worker:
    """A thread that does one call at a time. `done` is an eventfd that becomes readable when it has."""

    def __init__(self, watched: int | None) -> None:
        self.busy = False
        self.done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self.done, select.POLLIN)
        if watched is not None:
            self._poll.register(watched, select.POLLIN)
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._result: object = None
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="offload", daemon=True).start()

    def start(self, call: Callable[[], object]) -> None:
        self.busy = True
        self._calls.put(call)

    def wait(self) -> bool:
        """Wait on the spot, for a moment. Returns whether the call is done."""
        return any(fd == self.done for fd, _events in self._poll.poll(PATIENCE_MS))

    async def wait_long(self) -> None:
        """Wait with the event loop until the call is done, whoever is cancelled."""
        with trio.CancelScope(shield=True):
            await trio.lowlevel.wait_readable(self.done)

    def finish(self) -> object:
        """The result, or the exception, of a call that is done."""
        os.eventfd_read(self.done)
        result, error = self._result, self._error
        self._result = self._error = None
        self.busy = False
        if error is not None:
            raise error
        return result

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            try:
                self._result = call()
            except BaseException as error:
                self._error = error
            del call
            os.eventfd_write(self.done, 1)


class _Background:
    """A thread for calls that nobody waits for."""

    _MOST = 16

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        threading.Thread(target=self._work, name="background", daemon=True).start()

    def put(self, call: Callable[[], object]) -> None:
        if self._calls.qsize() < self._MOST:
            self._calls.put(call)

    def _work(self) -> None:
        while True:
            with suppress(Exception):
                self._calls.get()()


class _Offload:
    """The worker of this process, made when first used."""

    def __init__(self) -> None:
        self.watched: int | None = None
        self.worker: Worker | None = None
        self.background: _Background | None = None
        self.due = 0.0
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """The threads are the parent's, or the worker's does not know yet what to watch."""
        self.worker = self.background = None

    def idle_worker(self) -> Worker | None:
        if self.worker is None:
            try:
                self.worker = Worker(self.watched)
            except (OSError, RuntimeError):  # no descriptor, or no thread, to be had: it goes without
                return None
        return None if self.worker.busy else self.worker


_offload = _Offload()


def watch(fd: int) -> None:
    """A descriptor whose becoming readable ends the waiting on the spot: somebody wants the loop."""
    _offload.watched = fd
    _offload.forget()
    _offload.idle_worker()  # while there are descriptors


def in_background(call: Callable[[], object]) -> None:
    """`call()` in a thread, without waiting. Its outcome is lost, and it is not made at all if too many wait."""
    with suppress(RuntimeError):  # no thread to be had
        if _offload.background is None:
            _offload.background = _Background()
        _offload.background.put(call)


def start(call: Callable[[], object]) -> Worker | None:
    """Give a call to the worker, if there is one and it is idle: whoever does that must `finish` it."""
    worker = _offload.idle_worker()
    if worker is not None:
        worker.start(call)
    return worker


@trio.lowlevel.enable_ki_protection
async def offload(call: Callable[[], T]) -> T:
    """`call()` in a thread. Cancellation waits for it: its buffers are in use until it ends. Raises what it raises."""
    if time.monotonic() > _offload.due:  # a turn for the others now and then, not with each call
        await trio.lowlevel.cancel_shielded_checkpoint()
        _offload.due = time.monotonic() + PATIENCE_MS / 1000
    worker = start(call)
    if worker is not None:
        if not worker.wait():
            await worker.wait_long()
        return cast(T, worker.finish())
    with trio.CancelScope(shield=True):
        return await trio.to_thread.run_sync(call)
    raise AssertionError("a shielded scope lets no cancellation end it")
