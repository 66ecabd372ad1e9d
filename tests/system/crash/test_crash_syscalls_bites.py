"""The judge of test_crash_syscalls.py bites: each test falsifies the log of a real mount, and must be found out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.helpers.doubles.crash import SEED
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.judges.strace_log import Call, Event
from tests.helpers.judges.survival import BAD
from tests.helpers.judges.traced_run import run_of
from tests.helpers.mounts.modes import NATIVE, NEEDS_NATIVE
from tests.helpers.mounts.traced import Traced, traced

pytestmark = NEEDS_NATIVE


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return as_usual(tmp_path_factory, "allocate", "over raw", dict.fromkeys((1, 2), "synced write synced"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return as_usual(tmp_path_factory, "holes", "alone", {1: "synced"})


def as_usual(factory: pytest.TempPathFactory, scenario: str, backing: str, commits: dict[int, str]) -> Traced:
    """A run in which these fsyncs did this to the image: on a slow machine the commit timer may meddle."""
    for _ in range(5):
        found = traced(factory.mktemp(scenario), scenario, NATIVE, backing)
        if all(" ".join(call.kind for call in commit(found, number)[1]) == kinds for number, kinds in commits.items()):
            return found
    raise AssertionError("the guest's fsyncs do something else")


def judge(found: Traced, events: list[Event]) -> None:
    run = run_of(found, events)
    run_seeded(SEED, lambda: run.enumerate(random.Random(SEED), complete=128, samples=600))


def expect_failure(found: Traced, events: list[Event]) -> None:
    assert events != found.events
    with pytest.raises(AssertionError, match=BAD):
        judge(found, events)


def commit(found: Traced, number: int) -> tuple[Call, list[Call]]:
    """The guest's fsync of that number, from 0 on, and what was done to the image during it."""
    fsync = [event.call for event in found.events if event.call.path == found.raw and event.call.kind == "synced"][
        2 * number
    ]
    first, last = (at for at, event in enumerate(found.events) if event.call is fsync)
    inside = found.events[first:last]
    return fsync, [event.call for event in inside if event.call.path == found.image and not event.ended]


def without(events: list[Event], *calls: Call) -> list[Event]:
    return [event for event in events if event.call not in calls]


def moved(events: list[Event], which: Callable[[Event], bool], before: Call) -> list[Event]:
    """These events happen just before `before` begins."""
    rest = [event for event in events if not which(event)]
    place = next(at for at, event in enumerate(rest) if event.call is before)
    return rest[:place] + [event for event in events if which(event)] + rest[place:]


@pytest.mark.parametrize("name", ["overlay", "alone"])
def test_the_truth_is_believed(request: pytest.FixtureRequest, name: str) -> None:
    found: Traced = request.getfixturevalue(name)
    judge(found, list(found.events))


def test_without_the_barrier(overlay: Traced) -> None:
    _fsync, [barrier, _table, _sync] = commit(overlay, 1)
    expect_failure(overlay, without(overlay.events, barrier))


def test_a_table_before_the_barrier(overlay: Traced) -> None:
    _fsync, [barrier, table, _sync] = commit(overlay, 1)
    expect_failure(overlay, moved(overlay.events, lambda event: event.call is table, barrier))


def test_data_behind_the_barrier(overlay: Traced) -> None:
    """What the fast path wrote last comes between the barrier and the table."""
    fsync, [_barrier, table, _sync] = commit(overlay, 1)
    before = [event.call for event in overlay.events[: overlay.events.index(Event(fsync))]]
    data = [call for call in before if call.path == overlay.image][-1]
    assert data.kind == "write"
    expect_failure(overlay, moved(overlay.events, lambda event: event.call is data, table))


def test_the_barrier_begins_before_the_data_is_written(overlay: Traced) -> None:
    """They overlap: the sync need not have seen the write."""
    fsync, [barrier, _table, _sync] = commit(overlay, 1)
    before = [event.call for event in overlay.events[: overlay.events.index(Event(fsync))]]
    data = [call for call in before if call.path == overlay.image][-1]
    expect_failure(overlay, moved(overlay.events, lambda event: event == Event(barrier), data))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_fsync_is_acknowledged_early(overlay: Traced, number: int) -> None:
    fsync, inside = commit(overlay, number)
    expect_failure(overlay, moved(overlay.events, lambda event: event == Event(fsync, ended=True), inside[-1]))


def test_an_fsync_that_syncs_nothing(overlay: Traced) -> None:
    _fsync, inside = commit(overlay, 2)
    expect_failure(overlay, without(overlay.events, *(call for call in inside if call.kind == "synced")))


@pytest.mark.parametrize("name", ["overlay", "alone"])
def test_the_end_of_the_mount_syncs_nothing(request: pytest.FixtureRequest, name: str) -> None:
    found: Traced = request.getfixturevalue(name)
    last = max(at for at, event in enumerate(found.events) if event.call.path == found.raw)
    syncs = [event.call for event in found.events[last:] if event.call.kind == "synced"]
    expect_failure(found, without(found.events, *syncs))


def test_without_the_mark(alone: Traced) -> None:
    """The tables change while the header says that they are sound."""
    calls = [event.call for event in alone.events if event.call.path == alone.image and not event.ended]
    header = next(call for call in calls if call.kind == "write" and call.offset == 0)
    sync = next(call for call in calls[calls.index(header) :] if call.kind == "synced")
    expect_failure(alone, without(alone.events, header, sync))


def test_holes_that_no_fsync_makes_durable(alone: Traced) -> None:
    _fsync, [sync] = commit(alone, 1)
    expect_failure(alone, without(alone.events, sync))


def test_holes_that_were_not_made(alone: Traced) -> None:
    punch = next(event.call for event in alone.events if event.call.path == alone.image and event.call.kind == "punch")
    expect_failure(alone, without(alone.events, punch))


def test_a_write_is_missing_in_the_log(overlay: Traced) -> None:
    lost = next(event.call for event in overlay.events if event.call.path == overlay.image and event.call.data)
    with pytest.raises(AssertionError, match="is not in the log"):
        run_of(replace(overlay, events=without(overlay.events, lost)))


def test_writes_to_the_same_place_overlap(overlay: Traced) -> None:
    tables = [commit(overlay, number)[1][1] for number in (1, 2)]
    assert tables[0].offset == tables[1].offset
    with pytest.raises(AssertionError, match="who was first"):
        run_of(
            overlay,
            moved(overlay.events, lambda event: event == Event(tables[0], ended=True), commit(overlay, 2)[1][2]),
        )
