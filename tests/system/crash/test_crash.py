"""Every crash that the scenarios can have: what could be on the disk is built, opened and judged.

Small moments are enumerated completely, large ones drawn at random. `QEDFUSE_CRASH_STATES` (50000) is how many states
to try in all, `QEDFUSE_CRASH_SEED` the seed. That the harness bites is shown in test_crash_bites.py.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from qedfuse.qed import file_growth as growing
from qedfuse.qed.header import Header
from tests.helpers.doubles.crash import SEED, STATES
from tests.helpers.doubles.ram import Chaos, RamFile
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.images.images import TINIEST, TINY, Chain, assert_sound, contents, new_chain, read_header
from tests.helpers.images.scenarios import (
    BELOW,
    CLUSTER,
    SCENARIOS,
    SIZE,
    allocate,
    dirty_end,
    go_on,
    new_tables,
    random_walk,
    reuse,
    run_scenario,
)
from tests.helpers.images.table_scenarios import TABLE_SCENARIOS, run_tables
from tests.helpers.judges.history import SECTOR, Guest
from tests.helpers.judges.survival import Run, Scenario, raw_below

COMPLETE = 1024  # states of one moment up to which all of them are tried
#: Each scenario alone and over both kinds of backing files, tables, the headers, repair.
RUNS = len(SCENARIOS) * len(BELOW) + 2 * len(TABLE_SCENARIOS) + 8


@pytest.fixture(autouse=True)
def growth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file grows by what is needed, so that it often does; over a short backing file in large steps, as in life."""
    if "shorter" not in request.node.name:
        monkeypatch.setattr(growing, "_GROW_CLUSTERS", 0)


class Totals:
    runs = states = complete = sampled = qemu = 0

    def add(self, run: Run) -> None:
        self.runs += 1
        self.states += run.tried
        self.complete += run.complete_points
        self.sampled += run.sampled_points
        self.qemu += run.qemu_states


TOTALS = Totals()


async def enumerate_all(run: Run, directory: Path | None) -> None:
    rnd = random.Random(SEED)
    moments = sum(point.count <= COMPLETE for point in run.storage.crash_points())
    complete = COMPLETE if moments < 50 else COMPLETE // 8
    await run.enumerate(rnd, complete=complete, samples=min(STATES, 50_000) // RUNS, directory=directory)
    TOTALS.add(run)


@pytest.mark.parametrize("backing", BELOW)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_crash(scenario: Scenario, backing: str, tmp_path: Path) -> None:
    async def main() -> None:
        run = await run_scenario(scenario, backing)
        await enumerate_all(run, tmp_path)
        assert run.tried > 20

    run_seeded(SEED, main)


@pytest.mark.parametrize("backing", ["alone", "shorter"])
def test_new_tables(backing: str) -> None:
    async def main() -> None:
        below, flat = raw_below(BELOW[backing]) if BELOW[backing] else ([], b"")
        run = await Run.of(new_tables, size=3 * TINIEST.l2_coverage, below=below, flat=flat, geometry=TINIEST)
        await enumerate_all(run, None)

    run_seeded(SEED, main)


@pytest.mark.parametrize("backing", ["alone", "shorter"])
@pytest.mark.parametrize("scenario", TABLE_SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_whole_tables(scenario: Scenario, backing: str, tmp_path: Path) -> None:
    async def main() -> None:
        run = await run_tables(scenario, backing)
        await assert_sound(run.storage.file)
        await enumerate_all(run, tmp_path)

    run_seeded(SEED, main)


def test_over_a_qed_image(tmp_path: Path) -> None:
    """The layer below is QED, with data, zeroes and nothing over raw."""

    async def main() -> None:
        below, flat = raw_below(5 * CLUSTER)
        size = 16 * CLUSTER
        middle = await Run.of(middle_writes, size=size, below=below, flat=flat)
        chain = Chain(middle.storage.file, below)
        content = await contents(chain)
        run = await Run.of(reuse, size=SIZE, below=[*below, (chain.file, "qed")], flat=content)
        key = chain.file.key()
        await enumerate_all(run, tmp_path)
        assert chain.file.key() == key

    async def middle_writes(guest: Guest) -> None:
        await guest.write(2 * CLUSTER, SECTOR)
        await guest.zero(0, CLUSTER)
        await guest.write(10 * CLUSTER, CLUSTER)
        await guest.close()

    run_seeded(SEED, main)


def with_header(file: RamFile, header: Header) -> RamFile:
    file.write(0, header.encode())
    return file


@pytest.mark.parametrize("backing", ["alone", "shorter"])
def test_autoclear_bits(backing: str) -> None:
    """No state has a change in it while a bit that we do not know still vouches for what was before."""

    async def main() -> None:
        below, flat = raw_below(BELOW[backing]) if BELOW[backing] else ([], b"")
        chain = await new_chain(SIZE, TINY, below)
        header = replace(read_header(chain.file), autoclear_features=0x5, compat_features=0x9)
        with_header(chain.file, header)
        run = await Run.of(allocate, size=SIZE, flat=flat, start=chain)
        before = 0
        for point in run.storage.crash_points():
            if point.count > COMPLETE:
                continue
            for file in point.every_state():
                found = read_header(file)
                assert found.compat_features == 0x9
                if found.autoclear_features:
                    before += 1
                    assert found == header
                    assert file.key() == chain.file.key()
        assert before
        await enumerate_all(run, None)

    run_seeded(SEED, main)


def test_repair_and_after(tmp_path: Path) -> None:
    """Crashes while an unclean image is being repaired on the way to a writable open, and in the writes after that."""

    async def main() -> None:
        first = await Run.of(dirty_end, size=SIZE)
        rnd = random.Random(SEED)
        *_, point = first.storage.crash_points()
        *_, early = [point for point in first.storage.crash_points() if point.pending and point.sizes[1:]]
        done = set()
        for number in range(60):
            # Also states with a short file, whose tables point outside: the size is chosen against all odds.
            file = (early if number % 2 else point).some_state(rnd)
            if number % 4 == 1 and len(file.pages) > 3:
                file.truncate((max(file.pages) + 1) * 4096 - CLUSTER)
            if not read_header(file).needs_check or file.key() in done:
                continue
            done.add(file.key())
            fixed = Chain(file.fork(), [])
            trial = await Run.of(nothing, size=SIZE, start=fixed)
            flat = await contents(Chain(trial.storage.file, []))
            run = await Run.of(go_on, size=SIZE, flat=flat, start=Chain(file, []))
            await run.enumerate(rnd, complete=256, samples=40, directory=tmp_path, ask_qemu=number % 3 == 0)
            TOTALS.add(run)
        assert len(done) >= 10

    async def nothing(guest: Guest) -> None:
        await guest.close()

    run_seeded(SEED, main)


@pytest.mark.timeout(0)
def test_random_walks(tmp_path: Path) -> None:
    """As many as it takes to make up the number of states; here the knob for millions turns."""

    async def main(seed: int) -> None:
        backing = list(BELOW)[seed % len(BELOW)]
        run = await run_scenario(random_walk(seed), backing, chaos=Chaos(seed))
        samples = min(STATES // 4, 20_000)
        await run.enumerate(random.Random(seed), complete=128, samples=samples, directory=tmp_path, ask_qemu=1)
        TOTALS.add(run)

    if TOTALS.runs < RUNS:
        pytest.skip("makes up for what the other tests have left, all of them")
    seed = SEED
    while TOTALS.states < STATES:
        seed += 1
        run_seeded(seed, main, seed)


def test_how_many_states() -> None:
    """Says it; and when all of the above ran, it were many."""
    print(
        f"figures: {TOTALS.states} different states of a crash (seed {SEED}), {TOTALS.complete} moments in full, "
        f"{TOTALS.sampled} sampled; {TOTALS.qemu} states judged by qemu-img as well"
    )
    if TOTALS.runs >= RUNS:
        assert TOTALS.states >= STATES and TOTALS.complete > 500 and TOTALS.sampled > 100 and TOTALS.qemu > 50
