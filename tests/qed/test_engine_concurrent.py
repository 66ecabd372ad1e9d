"""The engine under tasks that run into each other, with awaits and refusals at every storage call."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio

from qedfuse.errors import QedfuseError
from qedfuse.qed import file_growth as growing
from qedfuse.qed.commit import MAX_DIRTY_PAGES
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.table_pages import PagePool
from tests.helpers.doubles.ram import Chaos
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.images.images import TINIEST, TINY, Chain, assert_sound, contents, new_chain, open_chain, raw_file
from tests.helpers.judges.expect import raises_errno
from tests.helpers.judges.history import SECTOR, ZEROES, Guest, History, fill

CLUSTER = 4096


async def new_guest(
    seed: int,
    size: int,
    backing: bool,
    geometry: Geometry = TINY,
    pool: PagePool | None = None,
    read_yields: int | None = None,
) -> tuple[Chain, Guest]:
    flat = fill(0xBACC, 0, size // 2) if backing else b""
    chain = await new_chain(size, geometry, [(raw_file(flat), "raw")] if backing else [])
    image = await open_chain(chain, chaos=Chaos(seed, read_yields=read_yields), pool=pool)
    return chain, Guest(image, History(flat.ljust(size, b"\0")), geometry.cluster_size)


def many(seeds: int, main: Callable[[int], Awaitable[None]]) -> None:
    for seed in range(seeds):
        run_seeded(seed, main, seed)


async def finish(chain: Chain, guest: Guest, *, leaks: bool = False) -> bytes:
    """Close; every sector is one of the versions that may have come last, whole. Returns the contents."""
    await guest.close()
    result = await assert_sound(chain.file, leaks=leaks)
    assert chain.file.size == result.image_end_offset, "clusters at the end that nobody needs"
    flat = await contents(chain)
    now = guest.history.tick()
    for number in range(len(flat) // SECTOR):
        found = flat[number * SECTOR : (number + 1) * SECTOR]
        possible = guest.history.sector(number).visible(now, now)
        assert found in possible, f"sector {number}: {found[:32]!r} is none of {[value[:32] for value in possible]}"
    return flat


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_tasks_that_overlap(backing: bool) -> None:
    """Six tasks on ten clusters, a hundred times, some with hardly any memory for tables."""
    small = PagePool(capacity=2)

    async def main(seed: int) -> None:
        rnd = random.Random(seed)
        size = 10 * CLUSTER
        chain, guest = await new_guest(seed, size, backing, pool=small if seed % 2 else None)

        async def task() -> None:
            for _ in range(12):
                await guest.do_something(rnd, size)

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(task)
        await finish(chain, guest)

    many(100, main)
    assert small.in_use == 0


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_cancelled_tasks(backing: bool) -> None:
    """Tasks that end anywhere: what they wrote is there in part or not, and the image is as good as ever."""

    async def main(seed: int) -> None:
        rnd = random.Random(seed)
        size = 10 * CLUSTER
        chain, guest = await new_guest(seed, size, backing)

        async def task(steps: int) -> None:
            with trio.CancelScope() as scope:

                async def killer() -> None:
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(killer)
                    for _ in range(12):
                        await guest.do_something(rnd, size)
                    nursery.cancel_scope.cancel()
            cancelled.append(scope.cancelled_caught)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(task, rnd.randrange(60) if number else 1 << 30)
        # A write that was cancelled may have happened in part: sectors may be torn, so compare by bytes.
        await guest.read(0, size)
        await guest.write(0, size)
        await finish(chain, guest, leaks=True)  # a cluster for a write that was cancelled, if others came behind it

    cancelled: list[bool] = []
    many(100, main)
    assert sum(cancelled) > 100, "the test cancels hardly anything"


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_resizes_in_between(backing: bool) -> None:
    """Below the smallest size all is exact; above, a sector is something that was written there, or zeroes."""
    low, high = 6 * CLUSTER + SECTOR, 14 * CLUSTER

    async def main(seed: int) -> None:
        rnd = random.Random(seed)
        chain, guest = await new_guest(seed, low, backing)
        written: set[bytes] = set()

        async def inside() -> None:
            for _ in range(12):
                await guest.do_something(rnd, low)

        async def outside() -> None:
            for number in range(12):
                size = rnd.choice([1, 8, 9]) * SECTOR
                offset = low + rnd.randrange((high - low - size) // SECTOR) * SECTOR
                data = fill(0xAAA00 + number, offset, size)
                written.update(data[start : start + SECTOR] for start in range(0, size, SECTOR))
                await guest.image.write(offset, data)
                assert guest.image.size >= low

        async def resizer() -> None:
            for _ in range(8):
                await guest.image.resize(rnd.randrange(low // SECTOR, high // SECTOR + 1) * SECTOR)

        async with trio.open_nursery() as nursery:
            for task in (inside, inside, outside, outside, resizer):
                nursery.start_soon(task)
        size = guest.image.size
        assert low <= size <= high
        await guest.image.close()
        await assert_sound(chain.file)
        flat = await contents(chain)
        assert len(flat) == size
        now = guest.history.tick()
        for number in range(size // SECTOR):
            found = flat[number * SECTOR : (number + 1) * SECTOR]
            if number < low // SECTOR:
                assert found in guest.history.sector(number).visible(now, now), number
            else:
                assert found == ZEROES or found in written, (number, found[:32])

    many(100, main)


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_one_cluster_is_allocated_once(backing: bool) -> None:
    """Eight writers of eight sectors of one unallocated cluster."""

    async def main(seed: int) -> None:
        chain, guest = await new_guest(seed, 8 * CLUSTER, backing)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(guest.write, CLUSTER + number * SECTOR, SECTOR)
        await finish(chain, guest)
        # Header, L1 table, one L2 table and one cluster; nothing was allocated and thrown away.
        assert chain.file.size == (1 + 2 + 2 + 1) * CLUSTER

    many(50, main)


def test_a_table_is_made_once() -> None:
    """Writers of different clusters that one new L2 table maps."""

    async def main(seed: int) -> None:
        chain, guest = await new_guest(seed, 8 * CLUSTER, False)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(guest.write, number * CLUSTER, CLUSTER)
        await finish(chain, guest)
        assert chain.file.size == (1 + 2 + 2 + 8) * CLUSTER

    many(50, main)


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_readers_never_see_a_recycled_cluster(backing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters are freed and come back elsewhere at full speed, while slow readers read all of it."""
    monkeypatch.setattr(growing, "_GROW_CLUSTERS", 0)

    async def main(seed: int) -> None:
        rnd = random.Random(seed)
        chain, guest = await new_guest(seed, 6 * CLUSTER, backing, read_yields=80)
        churning = 6

        async def churn(cluster: int) -> None:
            nonlocal churning
            for _ in range(20):
                # One sector: the rest of the new cluster must read as zeroes, not as its former life.
                await guest.write(cluster * CLUSTER + rnd.randrange(8) * SECTOR, SECTOR)
                for _ in range(rnd.randrange(30)):
                    await trio.lowlevel.checkpoint()
                await guest.discard(cluster * CLUSTER, CLUSTER)
                await guest.flush()
            churning -= 1

        async def reader() -> None:
            while churning:
                await guest.read(rnd.randrange(6) * CLUSTER, CLUSTER)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for cluster in range(6):
                nursery.start_soon(churn, cluster)
            for _ in range(3):
                nursery.start_soon(reader)
        assert chain.file.size <= (1 + 2 + 2 + 6 * 4) * CLUSTER, "little is recycled"
        await finish(chain, guest)

    many(12, main)


def test_memory_for_tables_is_bounded() -> None:
    """A pool of 8 pages serves an image with 64 tables; dirty pages may exceed it up to the commit's bound."""
    pool = PagePool(capacity=8)

    async def main() -> None:
        size = 64 * TINIEST.l2_coverage
        chain, guest = await new_guest(5, size, False, TINIEST, pool)
        image = guest.image
        for number in range(64):
            await guest.write(number * TINIEST.l2_coverage + 4 * SECTOR, SECTOR)
            if number % 4 == 3:
                await guest.write_back()
            assert pool.in_use <= 8 + 5
        for number in random.Random(1).sample(range(64), 64):
            await guest.read(number * TINIEST.l2_coverage, CLUSTER)
            assert pool.in_use <= 8
        await image.close()
        assert pool.in_use == 0
        await assert_sound(chain.file)

    run_seeded(1, main)


def test_dirty_tables_are_bounded_without_a_timer() -> None:
    """Nobody flushes: writers themselves commit when too many pages are dirty."""
    pool = PagePool(capacity=8)

    async def main() -> None:
        tables = MAX_DIRTY_PAGES + 40
        size = tables * TINIEST.l2_coverage
        chain, guest = await new_guest(5, size, False, TINIEST, pool)
        most = 0
        for number in range(tables):
            await guest.image.write(number * TINIEST.l2_coverage, b"x" * SECTOR)
            most = max(most, pool.in_use)
        assert MAX_DIRTY_PAGES <= most <= MAX_DIRTY_PAGES + 8
        assert guest.image.stats().dirty_pages < 50
        await guest.image.close()
        await assert_sound(chain.file)

    run_seeded(1, main)


def test_flushes_share_commits() -> None:
    """Twenty flushes at once cost two or three commits, and each covers what was written before it."""

    async def main() -> None:
        chain, guest = await new_guest(1, 40 * CLUSTER, True)
        storage = guest.image.storage
        for _ in range(3):
            before = storage.syncs  # type: ignore[attr-defined]
            async with trio.open_nursery() as nursery:
                for number in range(20):

                    async def write_and_flush(number: int) -> None:
                        await guest.write(number * CLUSTER, SECTOR)
                        await guest.flush()

                    nursery.start_soon(write_and_flush, number)
            assert storage.syncs - before <= 12  # type: ignore[attr-defined]
        await finish(chain, guest)

    run_seeded(1, main)


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_close_meets_the_timer(backing: bool) -> None:
    """A background commit that runs, or wants to, when the image is closed: the file is trimmed all the same."""

    async def main(seed: int) -> None:
        rnd = random.Random(seed)
        chain, guest = await new_guest(seed, 10 * CLUSTER, backing)

        async def timer() -> None:
            while True:
                for _ in range(rnd.randrange(20)):
                    await trio.lowlevel.checkpoint()
                if guest.image.storage.closed:  # type: ignore[attr-defined]
                    with raises_errno(errno.EBADF):
                        await guest.image.write_back()
                    return
                with suppress(QedfuseError):  # it may be closed while we wait for the lock
                    await guest.image.write_back()

        async with trio.open_nursery() as nursery:
            await guest.write(0, CLUSTER)  # brings the L2 table
            await guest.write(CLUSTER, 7 * CLUSTER)
            await guest.flush()
            nursery.start_soon(timer)
            await guest.discard(4 * CLUSTER, 4 * CLUSTER)
            for _ in range(rnd.randrange(30)):
                await trio.lowlevel.checkpoint()
            await finish(chain, guest)
            nursery.cancel_scope.cancel()

    many(60, main)
