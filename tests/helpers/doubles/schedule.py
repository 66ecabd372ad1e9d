"""Runs of trio that can be had again: the order of tasks is drawn from a seed, and the clock jumps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar
from unittest import mock

import trio
import trio._core._run as schedule
from trio.testing import MockClock

T = TypeVar("T")


def run_seeded(seed: int, main: Callable[..., Awaitable[T]], *arguments: object) -> T:
    """As `trio.run`. Sleeping takes no time when nothing else is to be done."""
    schedule._r.seed(seed)
    # Tasks are then sorted by when they were made before they are shuffled: the same seed gives the same order.
    with mock.patch.object(schedule, "_ALLOW_DETERMINISTIC_SCHEDULING", True):
        return trio.run(main, *arguments, clock=MockClock(autojump_threshold=0))
