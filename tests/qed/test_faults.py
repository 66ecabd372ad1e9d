"""Every storage call of every scenario fails once: the caller learns it, nothing else breaks, and no flush lies.

In the ordinary run each call fails in one way, those of some scenarios in every way; the slow run does it all.
`QEDFUSE_CRASH_SEED` is the seed.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import trio

from qedfuse.qed import file_growth as growing
from tests.helpers.doubles.crash import SEED
from tests.helpers.doubles.faults import Fault
from tests.helpers.doubles.ram import Chaos
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.images.images import (
    TINIEST,
    TINY,
    Chain,
    contents,
    new_chain,
    open_chain,
    read_header,
)
from tests.helpers.images.scenarios import (
    BELOW,
    CHAOTIC,
    CLUSTER,
    SCENARIOS,
    SIZE,
    allocate,
    close_and_cancel,
    dirty_end,
    go_on,
    idle,
    lose,
    new_tables,
    reuse,
    shrink_and_grow,
    timer,
)
from tests.helpers.images.table_scenarios import TABLE_SCENARIOS, TABLES, tables_among_tasks
from tests.helpers.judges.survival import Run, Scenario, raw_below
from tests.helpers.judges.trials import FAULTS, POOL, Trial

#: Those whose calls fail in every way in the ordinary run, too.
THOROUGH: list[Scenario] = [allocate, reuse, shrink_and_grow, idle]
#: Where nobody may have waited for the call that failed.
QUIET: set[Scenario] = {timer, close_and_cancel, tables_among_tasks}
INJECTED: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file grows often."""
    monkeypatch.setattr(growing, "_GROW_CLUSTERS", 0)


def trial_of(scenario: Scenario, chain: Chain, flat: bytes, fault: Fault | None) -> Trial:
    trial = Trial(chain, flat, fault, TINIEST if scenario is new_tables else TINY)
    if scenario in CHAOTIC or scenario is tables_among_tasks:
        trial.storage.chaos = Chaos(SEED)
    return trial


async def chain_for(scenario: Scenario, backing: str) -> tuple[Chain, bytes]:
    """A fresh image, and what it reads as."""
    size, geometry = SIZE, TINY
    if scenario is new_tables:
        size, geometry = TABLES * TINIEST.l2_coverage, TINIEST
    elif scenario in TABLE_SCENARIOS:
        size = TABLES * TINY.l2_coverage
    below, flat = raw_below(BELOW[backing]) if BELOW[backing] else ([], b"")
    return await new_chain(size, geometry, below), flat[:size].ljust(size, b"\0")


def fail_every_call(scenario: Scenario, start: Chain | None, flat: bytes, backing: str, *, thorough: bool) -> None:
    """Run `scenario` once for each of its calls, or four times, on copies of `start`."""
    rnd = random.Random(SEED)

    async def one(fault: Fault | None) -> Trial:
        if start is None:
            chain, reads_as = await chain_for(scenario, backing)
        else:
            chain, reads_as = Chain(start.file.fork(), start.below), flat
        trial = trial_of(scenario, chain, reads_as, fault)
        await trial.run(scenario)
        if fault and not fault.hit:
            assert scenario in CHAOTIC or scenario is tables_among_tasks  # fewer calls than in the run without a fault
        elif fault:
            INJECTED[fault.hit] += 1
            try:
                await trial.judge(rnd, shared=scenario not in THOROUGH, quiet=scenario in QUIET)
            except AssertionError as error:
                calls = trial.storage.calls
                error.add_note(f"{fault}; around it: {calls[max(0, fault.call - 4) : fault.call + 5]}")
                raise
        return trial

    fine = run_seeded(SEED, one, None)
    assert not fine.errors
    assert {"read", "write", "sync", "truncate"} <= set(fine.storage.calls)
    for call in range(len(fine.storage.calls)):
        for code, when in FAULTS if thorough else [FAULTS[call % len(FAULTS)]]:
            run_seeded(SEED, one, Fault(call, code, when))
    assert POOL.in_use == 0


EVERY_SCENARIO = pytest.mark.parametrize(
    "scenario",
    [*(scenario for scenario in SCENARIOS if scenario is not lose), new_tables, *TABLE_SCENARIOS],  # that fails anyway
    ids=lambda scenario: scenario.__name__,
)


@pytest.mark.parametrize("backing", ["alone", "shorter"])
@EVERY_SCENARIO
def test_every_call_fails_once(scenario: Scenario, backing: str) -> None:
    fail_every_call(scenario, None, b"", backing, thorough=scenario in THOROUGH)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("backing", BELOW)
@EVERY_SCENARIO
def test_every_call_fails_in_every_way(scenario: Scenario, backing: str) -> None:
    if backing == "longer" and (scenario is new_tables or scenario in TABLE_SCENARIOS):
        pytest.skip("as over a shorter one: these are larger than both")
    fail_every_call(scenario, None, b"", backing, thorough=True)


def test_every_call_of_an_unclean_opening_fails_once() -> None:
    """The check and repair on the way to a writable open, and what comes after it."""

    async def unclean() -> list[tuple[Chain, bytes]]:
        first = await Run.of(dirty_end, size=SIZE)
        rnd = random.Random(SEED)
        points = [point for point in first.storage.crash_points() if point.pending]
        found: dict[object, tuple[Chain, bytes]] = {}
        for number in range(200):
            file = points[-1 - number % 2].some_state(rnd)
            if number % 4 == 1:  # a short file, whose tables point outside
                file.truncate((max(file.pages) + 1) * 4096 - CLUSTER)
            if read_header(file).needs_check and file.key() not in found:
                fixed = await open_chain(Chain(file.fork(), []))
                await fixed.close()
                found[file.key()] = Chain(file, []), await contents(Chain(fixed.storage.file, []))  # type: ignore[attr-defined]
        return list(found.values())[:: max(1, len(found) // 6)]

    images = trio.run(unclean)
    assert len(images) >= 4
    for chain, flat in images:
        fail_every_call(go_on, chain, flat, "alone", thorough=True)


@pytest.mark.parametrize("backing", ["alone", "shorter"])
def test_every_call_of_the_first_header_update_fails_once(backing: str) -> None:
    """Autoclear bits that we do not know are in the way of the first change."""

    async def with_bits() -> tuple[Chain, bytes]:
        chain, flat = await chain_for(allocate, backing)
        chain.file.write(0, replace(read_header(chain.file), autoclear_features=5).encode())
        return chain, flat

    chain, flat = trio.run(with_bits)
    fail_every_call(allocate, chain, flat, backing, thorough=True)


def test_how_many_faults() -> None:
    print(f"figures: {INJECTED.total()} faults in scenarios (seed {SEED}), by call: {dict(INJECTED)}")
    assert not INJECTED or len(INJECTED) > 5


@pytest.mark.parametrize("backing", ["alone", "shorter"])
def test_a_fault_among_tasks(backing: str) -> None:
    """Four tasks at once, one call fails: those that are told go on, and nobody else's data suffers."""
    told = 0

    async def main(seed: int) -> None:
        nonlocal told
        rnd = random.Random(seed)
        code, when = rnd.choice(FAULTS)
        chain, flat = await chain_for(allocate, backing)
        trial = Trial(chain, flat, Fault(rnd.randrange(150), code, when), chaos=Chaos(seed))
        guest = await trial.open()
        if guest is None:
            return

        async def task() -> None:
            for _ in range(12):
                await guest.do_something(rnd, SIZE)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(task)
        await guest.flush()
        await guest.close()
        told += bool(trial.errors)
        if trial.fault and trial.fault.hit:
            await trial.judge(rnd, shared=True)

    for seed in range(SEED, SEED + 200):
        run_seeded(seed, main, seed)
    assert told > 50
