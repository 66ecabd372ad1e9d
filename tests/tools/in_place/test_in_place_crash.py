"""Crashes of the conversions between raw and QED, enumerated; and each rule that keeps them safe, broken once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from qedfuse.chain.unfinished import Step, Unfinished
from qedfuse.tools.in_place import coming_home
from tests.helpers.doubles.crash import CrashStorage
from tests.helpers.doubles.ram_journal import RamJournal
from tests.helpers.images.check_images import CLUSTER
from tests.helpers.images.in_place_cases import (
    back_case,
    in_any_order,
    nothing_allocated,
    raw_case,
    with_leaks,
    written,
)
from tests.helpers.judges.in_place import Case, InPlaceCrashes


async def judge(case: Case, directory: Path | None, samples: int) -> InPlaceCrashes:
    crashes = InPlaceCrashes(case, seed=1, samples=samples, directory=directory)
    await crashes.enumerate()
    print(
        f"figures: {crashes.count} states, {crashes.finished} times finished, {crashes.taken_back} times taken back, "
        f"{crashes.qemu} judged by qemu-img"
    )
    assert crashes.finished > 2 and crashes.taken_back > 2
    return crashes


@pytest.mark.parametrize(
    ("size", "holes"), [(512, ()), (CLUSTER, ()), (5 * CLUSTER + 1024, (1, 3)), (4 * CLUSTER, (0, 1, 2, 3))]
)
def test_from_raw(tmp_path: Path, size: int, holes: tuple[int, ...]) -> None:
    trio.run(judge, raw_case(size, holes), tmp_path, 40)


@pytest.mark.parametrize(("size", "holes"), [(512, ()), (5 * CLUSTER + 1024, (3,)), (4 * CLUSTER, (0, 1, 2, 3))])
def test_back_to_raw(tmp_path: Path, size: int, holes: tuple[int, ...]) -> None:
    async def main() -> None:
        await judge(await back_case(raw_case(size, holes)), tmp_path, 40)

    trio.run(main)


@pytest.mark.parametrize("batch", [2, 1 << 17])
@pytest.mark.parametrize("make", [written, in_any_order, with_leaks])
def test_to_raw_with_moves(
    tmp_path: Path, make: Callable[[], Awaitable[Case]], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coming_home, "BATCH_CLUSTERS", batch)

    async def main() -> None:
        await judge(await make(), tmp_path, 10)

    trio.run(main)


def test_to_raw_of_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        await judge(await nothing_allocated(), tmp_path, 40)

    trio.run(main)


def without_sync(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the syncs of each conversion, that of this number is not done."""
    sync, counts = CrashStorage.sync, dict[int, int]()

    async def skipping(self: CrashStorage) -> None:
        count = counts[id(self.log)] = counts.get(id(self.log), -1) + 1
        if count == number:
            await trio.lowlevel.checkpoint()
        else:
            await sync(self)

    monkeypatch.setattr(CrashStorage, "sync", skipping)


def judge_both_ways() -> None:
    async def main() -> None:
        case = raw_case(5 * CLUSTER + 1024)
        back = await back_case(case)
        await judge(case, None, 20)
        await judge(back, None, 20)

    trio.run(main)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["tail", "switch", "finish"])
def test_it_bites_without_a_sync(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_sync(number, monkeypatch)
    with pytest.raises((AssertionError, OSError)):
        judge_both_ways()


@pytest.mark.parametrize("step", [Step.SWITCH, Step.FINISH])
def test_it_bites_without_a_journal(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RamJournal.write

    def forgetting(self: RamJournal, unfinished: Unfinished) -> None:
        if unfinished.step is not step:
            write(self, unfinished)

    monkeypatch.setattr(RamJournal, "write", forgetting)
    with pytest.raises((AssertionError, OSError)):
        judge_both_ways()


def test_it_bites_if_copies_are_not_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the moves: the first sync is that before the tables change."""
    without_sync(0, monkeypatch)

    async def main() -> None:
        await judge(await in_any_order(), None, 20)

    with pytest.raises((AssertionError, OSError)):
        trio.run(main)
