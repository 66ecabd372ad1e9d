"""What a guest may do to an image: the scenarios whose every crash is tried.

All are for an image of 12 clusters of 4 KiB and three sectors (`new_tables` for a larger one).
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.qed.commit_timer import COMMIT_DELAY, IDLE_DELAY
from tests.helpers.doubles.crash import SEED
from tests.helpers.doubles.ram import Chaos
from tests.helpers.images.images import TINIEST
from tests.helpers.judges.history import SECTOR, Guest
from tests.helpers.judges.survival import Run, Scenario, raw_below

CLUSTER = 4096
SIZE = 12 * CLUSTER + 3 * SECTOR  # ends inside a cluster


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
    """What was discarded is written again, a sector at a time, where it was."""
    for cluster in (1, 2, 6):
        await guest.write(cluster * CLUSTER, CLUSTER)
    await guest.flush()
    used = end_of_clusters(guest)
    await guest.discard(CLUSTER, 2 * CLUSTER)
    await guest.write(CLUSTER + SECTOR, SECTOR)
    await guest.flush()
    await guest.flush()
    await guest.write(2 * CLUSTER + SECTOR, SECTOR)
    await guest.flush()
    await guest.discard(6 * CLUSTER, CLUSTER)
    await guest.flush()
    await guest.zero(2 * CLUSTER, CLUSTER)
    await guest.write_back()
    await guest.write_back()
    await guest.write(2 * CLUSTER, 2 * SECTOR)
    assert guest.may_fail or end_of_clusters(guest) == used, "it has taken other clusters"
    await guest.close()


async def lose(guest: Guest) -> None:
    """Writes that fail when all is in the file: their clusters come back for others, of which a sector is written."""
    await guest.write(0, SECTOR)
    await guest.flush()
    for commit in (guest.flush, guest.write_back):
        for cluster in (1, 3):
            with suppress(OSError):
                async with no_entries(guest):
                    await guest.write(cluster * CLUSTER, 2 * CLUSTER)
        used = end_of_clusters(guest)
        await commit()
        for cluster in (5, 3, 8):
            await guest.write(cluster * CLUSTER + SECTOR, SECTOR)
        assert guest.may_fail or end_of_clusters(guest) == used, "nothing was reused"
        await guest.discard(3 * CLUSTER, 3 * CLUSTER)
    with suppress(OSError):
        async with no_entries(guest):
            await guest.write(9 * CLUSTER, 3 * CLUSTER)
    await guest.write(10 * CLUSTER, SECTOR)
    await guest.close()


@asynccontextmanager
async def no_entries(guest: Guest) -> AsyncIterator[None]:
    """What is written into new clusters fails as if the page of its table could not be read."""
    tables = guest.image.tables
    load = tables.load

    async def fail(index: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tables.load = fail  # type: ignore[method-assign]
    try:
        yield
    finally:
        tables.load = load  # type: ignore[method-assign]


def end_of_clusters(guest: Guest) -> int:
    """Where the file's clusters end; it stays where it is as long as used ones are handed out again."""
    return guest.image.stats().file_end_bytes


async def churn(guest: Guest) -> None:
    """Discards and writes without a pause, commits of both kinds in between."""
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


async def cut(guest: Guest) -> None:
    """To sizes that are no multiples of a sector, in clusters with data, with the backing file's, with zeroes, and in
    the last sector; then growing again."""
    for cluster in (1, 4, 9):
        await guest.write(cluster * CLUSTER, CLUSTER)
    await guest.zero(6 * CLUSTER, CLUSTER)
    await guest.flush()
    await guest.resize(9 * CLUSTER + 3 * SECTOR + 100)
    await guest.resize(9 * CLUSTER + 3 * SECTOR + 5)
    await guest.resize(11 * CLUSTER)
    await guest.write(9 * CLUSTER + 5 * SECTOR, SECTOR)
    await guest.flush()
    for size in (6 * CLUSTER + 700, 5 * CLUSTER + 1, 4 * CLUSTER + SECTOR + 6):
        await guest.resize(size)
        await guest.write_back()
    await guest.resize(12 * CLUSTER)
    await guest.flush()
    await guest.resize(4 * CLUSTER + 6)
    await guest.resize(3)
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
        assert guest.may_fail or not guest.image.header.needs_check
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
        assert guest.may_fail or storage.sync == original, "nothing was synced"
        storage.sync = original  # type: ignore[method-assign]
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


def random_walk(seed: int) -> Scenario:
    """Everything, at random, three tasks at a time."""

    async def walk(guest: Guest) -> None:
        rnd = random.Random(seed)

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

    return walk


long = random_walk(SEED)


SCENARIOS: list[Scenario] = [
    allocate, unaligned, in_place, concurrent, zero, reuse, lose, churn, grow, shrink, shrink_and_grow, cut, idle,
    idle_or_not, timer, close_and_cancel, long,
]  # fmt: skip
#: The sizes of backing files.
BELOW = {"alone": 0, "shorter": 7 * CLUSTER + SECTOR, "longer": 30 * CLUSTER}
CHAOTIC = {concurrent, in_place, close_and_cancel, long}


async def run_scenario(scenario: Scenario, backing: str, *, chaos: Chaos | None = None) -> Run:
    below, flat = raw_below(BELOW[backing]) if BELOW[backing] else ([], b"")
    if scenario in CHAOTIC:
        chaos = Chaos(SEED)
    return await Run.of(scenario, size=SIZE, below=below, flat=flat, chaos=chaos)
