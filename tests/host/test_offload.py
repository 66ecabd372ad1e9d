"""A call in a thread: what comes back, what a cancellation does, and that the loop is never away for long."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable

import pytest
import trio
import trio.testing

from qedfuse.host import offload as module
from qedfuse.host.offload import INLINE_WAIT_MS, in_background
from tests.helpers.doubles.host_calls import local_call


async def offload(function: Callable[[], object]) -> object:
    return await module.offload(local_call(function))


def test_results_and_exceptions_come_back() -> None:
    def fail() -> None:
        raise OSError(errno.EDOM, "no")

    async def main() -> None:
        for _ in range(3):
            assert await offload(lambda: 7) == 7
            assert await offload(threading.get_ident) != threading.get_ident()
            with pytest.raises(OSError) as caught:
                await offload(fail)
            assert caught.value.errno == errno.EDOM

    trio.run(main)


def test_slow_calls_run_side_by_side_and_the_loop_goes_on() -> None:
    ticks = []

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await trio.sleep(0.01)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            started = time.monotonic()
            async with trio.open_nursery() as calls:
                for _ in range(4):
                    calls.start_soon(offload, lambda: time.sleep(0.3))
            assert time.monotonic() - started < 0.9
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert len(ticks) > 10


def test_without_a_thread_to_be_had_the_loop_makes_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()

    def no_more(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def first() -> None:
        started.set()
        time.sleep(0.2)

    async def main() -> None:
        assert await offload(lambda: 1) == 1  # the worker is there
        with monkeypatch.context() as patch:
            patch.setattr("trio._core._thread_cache.THREAD_CACHE._idle_workers", {})
            patch.setattr(threading.Thread, "start", no_more)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(offload, first)
                await trio.testing.wait_all_tasks_blocked()
                assert started.wait(5)
                assert await offload(threading.get_ident) == threading.get_ident()

    trio.run(main)


def test_cancellation_waits_for_the_call() -> None:
    ended: list[int] = []

    def call() -> None:
        time.sleep(0.2)
        ended.append(1)

    async def main() -> None:
        with trio.move_on_after(0.02):
            await offload(call)
            assert ended
            await trio.lowlevel.checkpoint()
            raise AssertionError("not cancelled")
        assert ended
        assert await offload(lambda: 1) == 1  # the worker is free again

    trio.run(main)


def test_a_request_ends_the_inline_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inline wait would be five seconds; a request arrives after a tenth of one."""
    reader, writer = os.pipe()
    monkeypatch.setattr(module, "INLINE_WAIT_MS", 5000)
    monkeypatch.setattr(module, "_offload", module._Offload())
    module.watch(reader)
    served = []

    async def serve() -> None:
        await trio.lowlevel.wait_readable(reader)
        served.append(time.monotonic())
        os.read(reader, 1)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await trio.testing.wait_all_tasks_blocked()
            started = time.monotonic()
            threading.Timer(0.1, os.write, (writer, b"x")).start()
            await offload(lambda: time.sleep(1))
            assert served[0] - started < 0.6

    trio.run(main)
    os.close(reader)
    os.close(writer)
    assert INLINE_WAIT_MS <= 2


def test_a_child_process_has_a_worker_of_its_own() -> None:
    async def call() -> object:
        return await offload(os.getpid)

    assert trio.run(call) == os.getpid()
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if trio.run(call) == os.getpid() else 2
        finally:
            os._exit(code)
    with_limit = time.monotonic() + 20
    while (state := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < with_limit:
        time.sleep(0.01)
    assert state == (child, 0)


def test_calls_in_the_background_are_made_and_lost_if_they_fail_or_are_too_many() -> None:
    gate = threading.Event()
    made: list[int] = []

    def fail() -> None:
        made.append(0)
        raise OSError(errno.EIO, "nobody hears this")

    in_background(fail)
    in_background(gate.wait)
    for number in range(1, 100):
        in_background(lambda number=number: made.append(number))  # type: ignore[misc]
    gate.set()
    deadline = time.monotonic() + 10
    while len(made) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made[:5] == [0, 1, 2, 3, 4]
    assert len(made) < 50
