"""Looks at host names: bounded in time, and what is left behind is in nobody's way."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio

import qedfuse.host.lookups
from qedfuse.host.lookups import NoAnswerError, enter, look
from tests.helpers.judges.expect import raises_errno


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qedfuse.host.lookups, "PATIENCE", 0.2)


@pytest.fixture
def host() -> Iterator[threading.Event]:
    """Answers when it is set, and in the end."""
    answers = threading.Event()
    yield answers
    answers.set()


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(20):
            await body()

    trio.run(main)


def asking(host: threading.Event, place: object, answer: str = "answer") -> Callable[[], str]:
    def ask() -> str:
        enter(place)
        host.wait()
        return answer

    return ask


async def until(what: list[Any]) -> None:
    """Until a thread has put something in."""
    while not what:  # noqa: ASYNC110
        await trio.sleep(0.01)


def fails() -> None:
    raise ZeroDivisionError


def test_outcomes(host: threading.Event) -> None:
    async def body() -> None:
        host.set()
        assert await look(asking(host, 1)) == "answer"
        with pytest.raises(ZeroDivisionError):
            await look(fails)

    run(body)


def test_a_place_that_does_not_answer_is_left_alone(host: threading.Event) -> None:
    late: list[str] = []

    async def body() -> None:
        before = threading.active_count()
        with pytest.raises(NoAnswerError):
            await look(asking(host, "dead"), discard=late.append)
        started = time.monotonic()
        for _ in range(100):
            with pytest.raises(NoAnswerError):
                await look(asking(host, "dead"))
        assert threading.active_count() <= before + 3
        assert time.monotonic() - started < 100 * 0.2
        await look(lambda: enter("alive"))
        host.set()
        await until(late)
        assert late == ["answer"]
        assert await look(asking(host, "dead")) == "answer"

    run(body)


def test_whoever_was_left_behind_goes_no_further(host: threading.Event) -> None:
    ended: list[Exception] = []

    def wander() -> None:
        enter("dead")
        host.wait()
        try:
            enter("elsewhere")
        except NoAnswerError as error:
            ended.append(error)

    async def body() -> None:
        with pytest.raises(NoAnswerError):
            await look(wander)
        host.set()
        await until(ended)

    run(body)


def test_cancelled_it_waits_for_what_ends_soon(host: threading.Event) -> None:
    dropped: list[str] = []

    async def body() -> None:
        with trio.move_on_after(0.05):
            threading.Timer(0.1, host.set).start()
            await look(asking(host, 3), discard=dropped.append, patience=10)
        assert dropped == ["answer"]

    run(body)


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("can't start new thread")

    async def body() -> None:
        monkeypatch.setattr(trio.to_thread, "run_sync", refuse)
        with raises_errno(errno.EAGAIN):
            await look(lambda: None)

    run(body)
