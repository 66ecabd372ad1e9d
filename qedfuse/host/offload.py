"""System calls on host files, which may wait, in a thread; the event loop could not tell when a disk is done.

A call (`HostCall`) is made once and to its end: cancellation waits for it, and until then its buffers stay in use. Its
result is what the call returned, or raised, unchanged; it is handed out once, when the call is done, by `offload` or by
the `finish` of the worker that made it. Only `in_background` promises less.

trio's way to a thread and back costs 140 µs, and an fdatasync of a fast disk hardly more. So a worker, a thread of our
own, takes one call at a time, and the event loop waits for it inline, in poll(2), for as long as a fast disk may take:
40 µs instead. With the fast path there is a second worker, for calls of kind SYNC alone, which does not need the GIL.

The inline wait ends after `INLINE_WAIT_MS` milliseconds, and at once when a request of the kernel arrives (`watch`):
the loop is never away for longer than for a burst of the fast path. A call that takes longer goes on in its worker, and
a task waits for it. One that comes while the workers are busy is made in one of trio's threads.

A server that does not answer keeps the threads that wait for it, perhaps for ever. So each file system has a number of
trio's threads of its own (`_THREADS`), and a file behind a server never gets a worker.
"""

from __future__ import annotations

import os
import select
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from queue import SimpleQueue
from typing import Protocol

import trio

from qedfuse.host.closing import Closable
from qedfuse.host.host_call import CallKind, HostCall

Call = Callable[[], object]

#: How long the loop waits inline.
INLINE_WAIT_MS = 1

#: Threads of trio's that may wait for one file system.
_THREADS = 40


class Worker(ABC):
    """A thread that makes one call at a time. `done`: a descriptor that is readable from a call's end to its `finish`.

    There may be event loops in several threads: the worker is one loop's from `claim` to `finish`.
    """

    def __init__(self, done: int) -> None:
        self.done = done
        self._claimed = threading.Lock()

    def claim(self) -> bool:
        """Whether the worker was idle, and is the caller's now."""
        return self._claimed.acquire(blocking=False)

    @abstractmethod
    def attempt(self, call: HostCall) -> bool:
        """Begin a call, and wait for it inline, for `INLINE_WAIT_MS`. Returns whether it is done; in any case `finish`
        or `finish_later` must come next."""

    async def wait_long(self) -> None:
        """Wait with the event loop until the call is done, whatever is cancelled."""
        with trio.CancelScope(shield=True):
            await trio.lowlevel.wait_readable(self.done)

    def finish(self) -> object:
        """The result, or the exception, of a call that is done."""
        try:
            return self._finish()
        finally:
            self._claimed.release()

    async def finish_later(self) -> object:
        """As `finish`, for a call that is not done yet: the event loop waits, whatever is cancelled. A
        KeyboardInterrupt, which no scope shields from, is raised at the end."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                await self.wait_long()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        try:
            return self.finish()
        finally:
            if interrupt is not None:
                raise interrupt

    @abstractmethod
    def _finish(self) -> object: ...


class _Thread(Worker):
    """A thread of Python's, for any call."""

    def __init__(self, watched: int | None) -> None:
        super().__init__(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._poll = select.poll()
        self._poll.register(self.done, select.POLLIN)
        if watched is not None:
            self._poll.register(watched, select.POLLIN)
        self._calls: SimpleQueue[HostCall] = SimpleQueue()
        self._result: object = None
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="offload", daemon=True).start()

    def attempt(self, call: HostCall) -> bool:
        self._calls.put(call)
        return any(fd == self.done for fd, _events in self._poll.poll(INLINE_WAIT_MS))

    def _finish(self) -> object:
        os.eventfd_read(self.done)
        result, error = self._result, self._error
        self._result = self._error = None
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


class Syncer(Protocol):
    """A thread that makes one fdatasync at a time without a word of Python; the fast path has one."""

    def attempt(self, fd: int, milliseconds: int, /) -> bool: ...
    def finish(self) -> int: ...
    def fileno(self) -> int: ...


class _SyncThread(Worker):
    """For calls of kind SYNC alone."""

    def __init__(self, syncer: Syncer) -> None:
        super().__init__(syncer.fileno())
        self._syncer = syncer

    def attempt(self, call: HostCall) -> bool:
        [fd] = call.args
        assert isinstance(fd, int)
        return self._syncer.attempt(fd, INLINE_WAIT_MS)

    def _finish(self) -> object:
        code = self._syncer.finish()
        if code:
            raise OSError(code, os.strerror(code))
        return None


class _Background:
    """A thread for calls that are not waited for."""

    _MOST = 16

    def __init__(self) -> None:
        self._calls: SimpleQueue[Call] = SimpleQueue()
        threading.Thread(target=self._work, name="background", daemon=True).start()

    def put(self, call: Call) -> None:
        if self._calls.qsize() < self._MOST:
            self._calls.put(call)

    def _work(self) -> None:
        while True:
            with suppress(Exception):
                self._calls.get()()


class _Offload:
    """The workers of this process, made when first used."""

    def __init__(self) -> None:
        self.watched: int | None = None
        self.make_syncer: Callable[[int], Syncer] | None = None
        self.thread: Worker | None = None
        self.sync_thread: Worker | None = None
        self.background: _Background | None = None
        self.due = 0.0
        self._making = threading.Lock()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """The threads are the parent's, or do not know yet what to watch."""
        self._making = threading.Lock()
        self.thread = self.sync_thread = self.background = None

    def make(self) -> None:
        """Without a descriptor or a thread to be had it goes without."""
        with self._making, suppress(OSError, RuntimeError):
            self.thread = self.thread or _Thread(self.watched)
            if self.make_syncer is not None and self.watched is not None:
                self.sync_thread = self.sync_thread or _SyncThread(self.make_syncer(self.watched))


_offload = _Offload()


def watch(fd: int) -> None:
    """A descriptor that becomes readable when a request arrives, which ends the inline wait."""
    _offload.watched = fd
    _offload.forget()
    _offload.make()  # while there are descriptors


def sync_with(make_syncer: Callable[[int], Syncer]) -> None:
    """How to make a thread for fdatasync alone, once it is known what to `watch`."""
    _offload.make_syncer = make_syncer


def in_background(call: Call) -> None:
    """`call()` in a thread, without waiting. Its outcome is lost, and it is not made at all if too many wait."""
    with suppress(RuntimeError):  # no thread to be had
        if _offload.background is None:
            _offload.background = _Background()
        _offload.background.put(call)


def idle_worker(call: HostCall) -> Worker | None:
    """A worker for the call, claimed: it must attempt and finish it."""
    if not call.host.local:
        return None
    if _offload.thread is None:
        _offload.make()
    workers = (_offload.sync_thread, _offload.thread) if call.kind is CallKind.SYNC else (_offload.thread,)
    return next((worker for worker in workers if worker is not None and worker.claim()), None)


#: By device; each event loop has its own.
_limiters: trio.lowlevel.RunVar[dict[int, trio.CapacityLimiter]] = trio.lowlevel.RunVar("_limiters")


def _limiter(device: int) -> trio.CapacityLimiter:
    try:
        limiters = _limiters.get()
    except LookupError:
        limiters = {}
        _limiters.set(limiters)
    limiter = limiters.get(device)
    if limiter is None:
        limiter = limiters[device] = trio.CapacityLimiter(_THREADS)
    return limiter


@trio.lowlevel.enable_ki_protection
async def offload(call: HostCall) -> object:
    """`call()` in a thread. Cancellation waits for it, and so does a KeyboardInterrupt: its buffers are in use until it
    ends. Raises what it raises."""
    if time.monotonic() > _offload.due:  # a turn for the others now and then, not with each call
        await trio.lowlevel.cancel_shielded_checkpoint()
        _offload.due = time.monotonic() + INLINE_WAIT_MS / 1000
    worker = idle_worker(call)
    if worker is not None:
        return worker.finish() if worker.attempt(call) else await worker.finish_later()
    with trio.CancelScope(shield=True):
        try:
            return await trio.to_thread.run_sync(call.function, *call.args, limiter=_limiter(call.host.device))
        except RuntimeError:  # no thread to be had (a system call raises none): late is better than not at all
            return call()
    raise AssertionError("a shielded scope lets no cancellation end it")


async def to_its_end(function: Callable[[], Awaitable[None]]) -> None:
    """Await `function()`, whatever is cancelled. A KeyboardInterrupt, which finds trio's main task behind every shield,
    is raised when it has ended."""
    failed: list[BaseException] = []
    interrupt: KeyboardInterrupt | None = None
    done = trio.Event()

    async def run() -> None:
        try:
            await function()
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    trio.lowlevel.spawn_system_task(run)
    with trio.CancelScope(shield=True):
        while not done.is_set():
            try:
                await done.wait()
            except KeyboardInterrupt as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt from (failed[0] if failed else None)
    if failed:
        raise failed[0]


@asynccontextmanager
@trio.lowlevel.enable_ki_protection  # not of the block
async def closed_to_its_end(file: Closable) -> AsyncIterator[None]:
    """Close `file` after the block, whatever is cancelled. If the block fails, it is its error that is raised."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            await to_its_end(file.close)
        raise
    await to_its_end(file.close)
