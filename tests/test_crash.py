"""Every crash that these scenarios can have: what could be on the disk is built, opened and judged.

Small moments are enumerated completely, large ones drawn at random. `QEDFUSE_CRASH_STATES` (40000) is how many to draw
in all, `QEDFUSE_CRASH_SEED` the seed. The last tests break the order of writes on purpose: the harness must notice.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse import commit
from qedfuse.allocator import Allocator
from qedfuse.commit import COMMIT_DELAY, IDLE_DELAY, Committer
from qedfuse.geometry import UNALLOCATED
from qedfuse.header import FEATURE_NEED_CHECK, Header
from qedfuse.image import Image
from tests.helpers.crash import SEED, STATES
from tests.helpers.history import SECTOR, Guest
from tests.helpers.images import TINIEST, TINY, Chain, contents, new_chain, read_header
from tests.helpers.ram import Chaos, RamFile
from tests.helpers.schedule import run_seeded
from tests.helpers.survival import Run, Scenario, raw_below

CLUSTER = 4096
COMPLETE = 1024  # states of one moment up to which all of them are tried
SIZE = 12 * CLUSTER + 3 * SECTOR  # ends inside a cluster


@pytest.fixture(autouse=True)
def growth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file grows by what is needed, so that it often does; over a short backing file in large steps, as in life."""
    if "shorter" not in request.node.name:
        monkeypatch.setattr(commit, "_GROW_CLUSTERS", 0)


class Totals:
    runs = states = complete = sampled = qemu = 0

    def add(self, run: Run) -> None:
        self.runs += 1
        self.states += run.tried
        self.complete += run.complete_points
        self.sampled += run.sampled_points
        self.qemu += run.qemu_states


TOTALS = Totals()


# -- scenarios ------------------------------------------------------------------------------------------------------


async def allocate(guest: Guest) -> None:
    await guest.write(0, SECTOR)
    await guest.flush()
    await guest.write(SECTOR, SECTOR)  # in place
    await guest.write(2 * CLUSTER - SECTOR, 2 * SECTOR)  # in two new ones
    await guest.write(5 * CLUSTER, CLUSTER)
    await guest.flush()
    await guest.write(12 * CLUSTER + SECTOR, SECTOR)  # the last, partial cluster
    await guest.write_back()
    await guest.write(5 * CLUSTER + SECTOR, SECTOR)
    await guest.close()


async def unaligned(guest: Guest) -> None:
    await guest.write(100, 50)
    await guest.write(CLUSTER - 7, 20)
    await guest.flush()
    await guest.write(120, 1000)
    await guest.zero(3 * CLUSTER + 9, 100)
    await guest.write_back()
    await guest.write(CLUSTER + 5, 1)
    await guest.flush()


async def new_tables(guest: Guest) -> None:
    """For TINIEST over 6 MiB: three L2 tables, one after another and two in one commit."""
    table = TINIEST.l2_coverage
    await guest.write(table - SECTOR, 2 * SECTOR)
    await guest.write_back()
    await guest.write(CLUSTER, SECTOR)
    await guest.flush()
    await guest.write(2 * table + 8 * CLUSTER, SECTOR)
    await guest.write(table + 5 * CLUSTER, SECTOR)
    await guest.flush()
    await guest.write(2 * table + CLUSTER, SECTOR)
    await guest.close()


async def concurrent(guest: Guest) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(guest.write, CLUSTER + number * SECTOR, SECTOR)
        nursery.start_soon(guest.flush)
        nursery.start_soon(guest.write, 3 * CLUSTER, SECTOR)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.write, CLUSTER + 2 * SECTOR, 3 * SECTOR)
        nursery.start_soon(guest.flush)
        nursery.start_soon(guest.discard, 3 * CLUSTER, CLUSTER)
        nursery.start_soon(guest.write_back)
    await guest.flush()


async def zero(guest: Guest) -> None:
    await guest.write(0, 2 * CLUSTER)
    await guest.write(3 * CLUSTER, SECTOR)
    await guest.flush()
    await guest.zero(SECTOR, CLUSTER)  # the end of one, the beginning of the next
    await guest.zero(3 * CLUSTER, 2 * CLUSTER)  # one with data, one without
    await guest.write_back()
    await guest.write(4 * CLUSTER + SECTOR, SECTOR)
    await guest.write(7 * CLUSTER, CLUSTER, data=bytes(CLUSTER))
    await guest.flush()
    await guest.zero(0, SIZE)
    await guest.close()


async def reuse(guest: Guest) -> None:
    """Freed clusters come back for other guest clusters, of which only a sector is written."""
    for cluster in (1, 2):
        await guest.write(cluster * CLUSTER, CLUSTER)
    await guest.flush()
    await guest.discard(CLUSTER, 2 * CLUSTER)
    await guest.write(CLUSTER + SECTOR, SECTOR)
    await guest.flush()
    await guest.flush()
    used = guest.image._committer._allocator.end  # type: ignore[union-attr]
    await guest.write(6 * CLUSTER + SECTOR, SECTOR)
    await guest.write(8 * CLUSTER, SECTOR)
    assert guest.image._committer._allocator.end == used, "nothing was reused"  # type: ignore[union-attr]
    await guest.flush()
    await guest.zero(6 * CLUSTER, CLUSTER)
    await guest.write_back()
    await guest.write_back()
    await guest.write(2 * CLUSTER, 2 * SECTOR)
    await guest.close()


async def churn(guest: Guest) -> None:
    """Free and reuse without a pause, commits of both kinds in between."""
    for number in range(12):
        await guest.write(number % 5 * CLUSTER + number % 8 * SECTOR, SECTOR)
        await guest.discard((number + 2) % 5 * CLUSTER, CLUSTER)
        await (guest.flush if number % 2 else guest.write_back)()
    await guest.flush()


async def grow(guest: Guest) -> None:
    await guest.write(11 * CLUSTER, CLUSTER + 3 * SECTOR)
    await guest.resize(14 * CLUSTER)
    await guest.write(13 * CLUSTER + SECTOR, SECTOR)
    await guest.flush()
    await guest.write(16 * CLUSTER + SECTOR, SECTOR)  # past the end
    await guest.write_back()
    await guest.resize(20 * CLUSTER + SECTOR)
    await guest.flush()


async def shrink(guest: Guest) -> None:
    for cluster in (1, 4, 9):
        await guest.write(cluster * CLUSTER, CLUSTER)
    await guest.flush()
    await guest.write(9 * CLUSTER, SECTOR)
    await guest.resize(4 * CLUSTER + SECTOR)
    await guest.write(2 * CLUSTER, SECTOR)
    await guest.flush()
    await guest.resize(SECTOR)
    await guest.close()


async def shrink_and_grow(guest: Guest) -> None:
    for cluster in (1, 4, 9):
        await guest.write(cluster * CLUSTER, CLUSTER)
    await guest.flush()
    await guest.resize(4 * CLUSTER + SECTOR)
    await guest.resize(10 * CLUSTER)
    await guest.write(9 * CLUSTER + SECTOR, SECTOR)
    await guest.flush()
    await guest.resize(5 * CLUSTER)
    await guest.resize(12 * CLUSTER + SECTOR)
    await guest.write(4 * CLUSTER + 2 * SECTOR, SECTOR)
    await guest.write_back()
    await guest.flush()
    await guest.close()


async def idle(guest: Guest) -> None:
    """NEED_CHECK goes on and off."""
    await guest.write(0, SECTOR)
    await guest.flush()
    await guest.clean()
    await guest.write(SECTOR, SECTOR)
    await guest.flush()
    await guest.write(2 * CLUSTER, SECTOR)
    await guest.clean()
    await guest.discard(2 * CLUSTER, CLUSTER)
    await guest.write(3 * CLUSTER, SECTOR)
    await guest.write_back()
    await guest.clean()
    await guest.write(4 * CLUSTER, SECTOR)
    await guest.write_back()
    await guest.write(5 * CLUSTER, SECTOR)  # the file grows with the mark already on
    await guest.write_back()
    await guest.clean()
    await guest.close()


async def timer(guest: Guest) -> None:
    """Nobody flushes; the clock does it all."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.image.run_background)
        await guest.write(0, SECTOR)
        await trio.sleep(COMMIT_DELAY / 2)
        await guest.write(CLUSTER, SECTOR)
        await trio.sleep(COMMIT_DELAY)
        await guest.write(3 * CLUSTER, SECTOR)
        await guest.discard(CLUSTER, CLUSTER)
        await trio.sleep(IDLE_DELAY + 2 * COMMIT_DELAY)
        assert not guest.image.header.needs_check
        await guest.write(5 * CLUSTER, SECTOR)
        await trio.sleep(COMMIT_DELAY)
        await guest.close()
        nursery.cancel_scope.cancel()


async def in_place(guest: Guest) -> None:
    """Writes to clusters of their own that run into flushes: no table changes, only the data is at stake."""
    await guest.write(0, 4 * CLUSTER)
    await guest.flush()
    for number in range(6):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.write, number % 4 * CLUSTER, SECTOR)
            nursery.start_soon(guest.write, number % 4 * CLUSTER + 2 * SECTOR, SECTOR)
            nursery.start_soon(guest.zero, number % 4 * CLUSTER + 4 * SECTOR, SECTOR)
            nursery.start_soon(guest.flush)
        await guest.flush()


async def idle_or_not(guest: Guest) -> None:
    """The image is thought to be idle; while it is being flushed for that, a write and a commit without sync come."""
    await guest.write(0, SECTOR)
    await guest.write_back()
    storage = guest.image.storage
    original = storage.sync
    async with trio.open_nursery() as nursery:

        async def sync() -> None:
            storage.sync = original  # type: ignore[method-assign]
            await original()
            await guest.write(CLUSTER, SECTOR)
            nursery.start_soon(guest.write_back)
            await wait_all_tasks_blocked()

        storage.sync = sync  # type: ignore[method-assign]
        await guest.clean()
        assert storage.sync == original, "nothing was synced"
    await guest.write(2 * CLUSTER, SECTOR)
    await guest.write_back()
    await guest.close()


async def close_and_cancel(guest: Guest) -> None:
    """Writes that are cancelled somewhere, and what they allocated."""
    for number in range(6):
        with trio.CancelScope() as scope:

            async def killer(scope: trio.CancelScope, steps: int) -> None:
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(killer, scope, 2 * number)
                await guest.write(number * CLUSTER, 2 * SECTOR)
                await guest.flush()
                nursery.cancel_scope.cancel()
    await guest.flush()
    await guest.write(8 * CLUSTER + SECTOR, SECTOR)
    await guest.close()


async def long(guest: Guest) -> None:
    """Everything, at random, three tasks at a time."""
    rnd = random.Random(SEED)

    async def task() -> None:
        sectors = rnd.choice([1, 2, 8, 9])
        offset = rnd.randrange(12 * 8 - sectors) * SECTOR
        size = sectors * SECTOR
        choices: list[Callable[[], object]] = [
            lambda: guest.write(offset, size),
            lambda: guest.write(offset, size),
            lambda: guest.write(offset - offset % CLUSTER, size),
            lambda: guest.zero(offset, size),
            lambda: guest.discard(offset - offset % CLUSTER, CLUSTER),
            guest.flush,
            guest.write_back,
        ]
        await rnd.choice(choices)()  # type: ignore[misc]

    for number in range(25):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(task)
        if number % 10 == 9:
            await guest.clean()
    await guest.close()


SCENARIOS: list[Scenario] = [
    allocate, unaligned, in_place, concurrent, zero, reuse, churn, grow, shrink, shrink_and_grow, idle, idle_or_not,
    timer, close_and_cancel, long,
]  # fmt: skip
BELOW = {"alone": 0, "shorter": 7 * CLUSTER + SECTOR, "longer": 30 * CLUSTER}
CHAOTIC = {concurrent, in_place, close_and_cancel, long}
#: Each scenario alone and over both kinds of backing files, new_tables, the headers, repair.
RUNS = len(SCENARIOS) * len(BELOW) + 8


async def run_scenario(scenario: Scenario, backing: str, *, seed: int = SEED) -> Run:
    below, flat = raw_below(BELOW[backing]) if BELOW[backing] else ([], b"")
    chaos = Chaos(seed) if scenario in CHAOTIC else None
    return await Run.of(scenario, size=SIZE, below=below, flat=flat, chaos=chaos)


async def enumerate_all(run: Run, directory: Path | None) -> None:
    rnd = random.Random(SEED)
    moments = sum(point.count <= COMPLETE for point in run.storage.crash_points())
    complete = COMPLETE if moments < 50 else COMPLETE // 8
    await run.enumerate(rnd, complete=complete, samples=STATES // RUNS, directory=directory)
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


async def dirty_end(guest: Guest) -> None:
    """Leaves tables that are written but not durable, and data past the end of what may be left of the file."""
    await guest.write(CLUSTER, 2 * SECTOR)
    await guest.flush()
    await guest.write(2 * CLUSTER, SECTOR)
    await guest.write(4 * CLUSTER, SECTOR)
    await guest.discard(CLUSTER, CLUSTER)
    await guest.write_back()


async def go_on(guest: Guest) -> None:
    await guest.write(CLUSTER + SECTOR, SECTOR)
    await guest.write(6 * CLUSTER, SECTOR)
    await guest.flush()
    await guest.close()


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


def test_how_many_states(capsys: pytest.CaptureFixture[str]) -> None:
    """Says it; and when all of the above ran, it were many."""
    with capsys.disabled():
        print(
            f"\ncrash enumeration: {TOTALS.states} different states (seed {SEED}), {TOTALS.complete} moments in full, "
            f"{TOTALS.sampled} sampled; {TOTALS.qemu} states judged by qemu-img as well"
        )
    if TOTALS.runs >= RUNS:
        assert TOTALS.states > STATES // 2 and TOTALS.complete > 500 and TOTALS.sampled > 100 and TOTALS.qemu > 50


# -- the harness bites ----------------------------------------------------------------------------------------------


def expect_failure(scenario: Scenario, backing: str) -> None:
    """The scenario must have a state that is judged bad."""

    async def main() -> None:
        run = await run_scenario(scenario, backing)
        await run.enumerate(random.Random(SEED), complete=COMPLETE, samples=4000)

    with pytest.raises(AssertionError, match=r"reads as|lies outside the file"):
        run_seeded(SEED, main)


class TestTheHarnessBites:
    @pytest.mark.parametrize("backing", ["shorter", "longer"])
    def test_tables_before_the_barrier(self, monkeypatch: pytest.MonkeyPatch, backing: str) -> None:
        """With a backing file: no sync between the data and the L2 page."""
        original = Committer.__init__

        def broken(self: Committer, *arguments: object, barrier: bool) -> None:
            original(self, *arguments, barrier=False)  # type: ignore[arg-type]

        async def no_mark(self: Committer) -> None:
            pass

        monkeypatch.setattr(Committer, "__init__", broken)
        monkeypatch.setattr(Committer, "_mark", no_mark)
        expect_failure(allocate, backing)

    def test_tables_swapped_with_the_barrier(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All pages go before the barrier instead of behind it."""
        original = Committer._commit

        async def broken(self: Committer, durable: bool) -> None:
            tables = self._tables
            tables.new_tables.update(dict.fromkeys(range(tables.geometry.table_entries), 0))
            await original(self, durable)

        monkeypatch.setattr(Committer, "_commit", broken)
        expect_failure(allocate, "longer")

    def test_l1_before_the_barrier(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A new table's L1 entry goes to the file while the table may still lie outside it."""
        original = Committer._write_pages

        async def broken(self: Committer, group: list[object]) -> None:
            tables = self._tables
            level = tables.l1
            await original(self, [(level, i, level.hosts[i], bytes(level.pages[i])) for i in sorted(level.pinned)])
            await original(self, group)  # type: ignore[arg-type]

        monkeypatch.setattr(Committer, "_write_pages", broken)
        expect_failure(allocate, "longer")

    @pytest.mark.parametrize("backing", ["alone", "longer"])
    def test_reuse_without_waiting(self, monkeypatch: pytest.MonkeyPatch, backing: str) -> None:
        """A freed cluster comes back before the entry that freed it is durable."""
        monkeypatch.setattr(Allocator, "release", lambda self, offset, size: self._free.add(offset, size))
        expect_failure(churn, backing)

    def test_reuse_before_the_entry_is_durable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Punched first (so nothing stale shows), but the old entry may still be in the file."""

        async def punch_now(guest: Guest) -> None:
            allocator = guest.image._committer._allocator  # type: ignore[union-attr]

            def release(offset: int, size: int) -> None:
                guest.image.storage.apply_punch(offset, size)  # type: ignore[attr-defined]
                allocator._free.add(offset, size)

            allocator.release = release  # type: ignore[method-assign]
            await churn(guest)

        expect_failure(punch_now, "longer")

    def test_reuse_before_the_punch_is_durable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a backing file: the stale contents of a recycled cluster show beside what was written."""
        monkeypatch.setattr(Allocator, "add_punched", lambda self, offset, size: self._free.add(offset, size))
        expect_failure(churn, "alone")

    def test_reuse_without_punching(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def no_punch(self: Committer, released: list[tuple[int, int]]) -> None:
            for offset, size in released:
                self._allocator.add_punched(offset, size)

        monkeypatch.setattr(Committer, "_punch", no_punch)
        expect_failure(reuse, "alone")

    @pytest.mark.parametrize("scenario", [allocate, reuse], ids=lambda scenario: scenario.__name__)
    def test_no_need_check(self, monkeypatch: pytest.MonkeyPatch, scenario: Scenario) -> None:
        """Without a backing file and without the mark, nobody repairs the entries that point outside the file."""

        async def no_mark(self: Committer) -> None:
            pass

        monkeypatch.setattr(Committer, "_mark", no_mark)
        expect_failure(scenario, "alone")

    def test_mark_without_sync(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def lazy_mark(self: Committer) -> None:
            if not self._barrier and not self.header.needs_check:
                self.header = self.header.with_feature(FEATURE_NEED_CHECK, True)
                await self._storage.write(0, [self.header.encode()])

        monkeypatch.setattr(Committer, "_mark", lazy_mark)
        expect_failure(allocate, "alone")

    def test_clean_too_early(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """NEED_CHECK is cleared before the tables are durable."""
        original = Committer.clean

        async def broken(self: Committer) -> None:
            self.header = self.header.with_feature(FEATURE_NEED_CHECK, False)
            await self._storage.write(0, [self.header.encode()])
            await original(self)

        monkeypatch.setattr(Committer, "clean", broken)
        expect_failure(idle, "alone")

    def test_flush_without_sync(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A flush that only writes back."""
        monkeypatch.setattr(Committer, "flush", Committer.write_back)
        expect_failure(allocate, "alone")

    @pytest.mark.parametrize("backing", ["alone", "longer"])
    def test_shrink_in_the_wrong_order(self, monkeypatch: pytest.MonkeyPatch, backing: str) -> None:
        """The entries are dropped before the smaller size is durable."""

        async def broken(self: Image, size: int) -> None:
            old, self._size = self._size, size
            await self._clear(size, old, UNALLOCATED)
            await self._committer_of().shrink(size)

        monkeypatch.setattr(Image, "_shrink", broken)
        expect_failure(shrink, backing)

    def test_grow_in_the_wrong_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The larger size is written before the entries that hide the backing file."""
        original = Image._grow

        async def broken(self: Image, size: int) -> None:
            committer = self._committer_of()
            await committer._write_header(committer.header.with_image_size(size))
            await original(self, size)

        monkeypatch.setattr(Image, "_grow", broken)
        expect_failure(grow, "longer")

    def test_grow_without_hiding_the_tail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from qedfuse.clusters import ClusterWriter

        async def nothing(self: ClusterWriter, image_end: int) -> None:
            pass

        monkeypatch.setattr(ClusterWriter, "clear_tail", nothing)
        expect_failure(shrink_and_grow, "alone")
