"""A coroutine driven from one system call to the next: inline while calls are quick, by a task from there on."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from qedfuse.host import offload as offload_module
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.host_call import CallKind
from qedfuse.host.offload import idle_worker
from qedfuse.host.stepping import Stepper
from qedfuse.host.waiting import in_thread
from tests.helpers.doubles.host_calls import local_call
from tests.helpers.judges.expect import raises_errno

FOREVER = float("inf")


def calls(*functions: Callable[[], object]) -> tuple[Stepper, list[object]]:
    """A stepper for a coroutine that makes these calls, and what came of them."""
    outcomes: list[object] = []

    async def work() -> None:
        for function in functions:
            try:
                outcomes.append(await in_thread(local_call(function)))
            except OSError as error:
                outcomes.append(error.errno)
        outcomes.append("ended")

    return Stepper(work()), outcomes


def fail() -> None:
    raise OSError(errno.EDOM, "no")


def slow() -> int:
    time.sleep(0.2)
    return threading.get_ident()


def test_quick_calls_are_made_inline_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_module, "INLINE_WAIT_MS", 5000)
    stepper, outcomes = calls(threading.get_ident, fail, lambda: 7)
    assert stepper.run_inline(FOREVER)
    assert outcomes[1:] == [errno.EDOM, 7, "ended"]
    assert outcomes[0] != threading.get_ident()


def test_a_slow_call_is_waited_for_by_a_task_and_so_is_the_rest() -> None:
    async def main() -> None:
        stepper, outcomes = calls(slow, fail, lambda: 7)
        assert not stepper.run_inline(FOREVER)
        assert outcomes == []
        with trio.CancelScope() as scope:
            scope.cancel()
            await stepper.finish()
        assert outcomes[1:] == [errno.EDOM, 7, "ended"]
        worker = idle_worker(local_call(slow))
        assert worker is not None  # it is free again
        worker.attempt(local_call(lambda: None))
        await worker.finish_later()

    trio.run(main)


def test_no_call_is_begun_when_the_time_is_over() -> None:
    async def main() -> None:
        stepper, outcomes = calls(lambda: 7)
        assert not stepper.run_inline(time.monotonic())
        assert outcomes == []
        await stepper.finish()
        assert outcomes == [7, "ended"]

    trio.run(main)


def test_what_the_coroutine_raises_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        await in_thread(local_call(fail))

    monkeypatch.setattr(offload_module, "INLINE_WAIT_MS", 5000)
    with raises_errno(errno.EDOM):
        Stepper(work()).run_inline(FOREVER)

    async def main() -> None:
        stepper = Stepper(work())
        assert not stepper.run_inline(0)
        with raises_errno(errno.EDOM):
            await stepper.finish()

    trio.run(main)


class OneSync:
    """A `Syncer` that counts."""

    def __init__(self, watched: int) -> None:
        self.synced: list[int] = []
        self._done = os.eventfd(0)

    def attempt(self, fd: int, milliseconds: int, /) -> bool:
        self.synced.append(fd)
        return True

    def finish(self) -> int:
        return errno.EDQUOT

    def fileno(self) -> int:
        return self._done


def test_a_sync_goes_to_the_thread_for_syncs_by_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[OneSync] = []

    def make(watched: int) -> OneSync:
        made.append(OneSync(watched))
        return made[-1]

    reader, writer = os.pipe()
    monkeypatch.setattr(offload_module, "_offload", offload_module._Offload())
    offload_module.sync_with(make)
    offload_module.watch(reader)
    (tmp_path / "file").write_bytes(b"x")

    async def main() -> None:
        storage = FileStorage.open(tmp_path / "file", True)
        with raises_errno(errno.EDQUOT):
            await storage.sync()
        assert made[0].synced == [storage.fileno()]
        stepper = Stepper(storage.sync())
        assert stepper.call is not None and stepper.call.kind is CallKind.SYNC
        with raises_errno(errno.EDQUOT):
            stepper.run_inline(FOREVER)
        await storage.truncate(5)
        await storage.close()
        assert len(made[0].synced) == 2

    trio.run(main)
    for fd in (reader, writer, made[0].fileno()):
        os.close(fd)
