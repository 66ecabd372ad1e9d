"""What a guest may do to whole L2 tables: scenarios for images of three tables, whatever their geometry."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from qedfuse.layers.mapping import map_image
from tests.helpers.doubles.crash import SEED
from tests.helpers.doubles.ram import Chaos
from tests.helpers.images.images import TINY
from tests.helpers.images.scenarios import BELOW, end_of_clusters
from tests.helpers.judges.history import SECTOR, Guest
from tests.helpers.judges.survival import Run, Scenario, raw_below

CLUSTER = 4096
TABLES = 3


async def fill_tables(guest: Guest) -> int:
    """Data in all tables, at both ends. Returns how much one of them maps."""
    table = guest.image.geometry.l2_coverage
    for number in range(TABLES):
        await guest.write(number * table + CLUSTER, CLUSTER + SECTOR)
        await guest.write((number + 1) * table - CLUSTER, SECTOR)
    return table


async def cut_tables(guest: Guest) -> None:
    """Tables are cut off, with all that they map: the tail of the file. Then there is data, and are other tables."""
    table = await fill_tables(guest)
    await guest.flush()
    full = end_of_clusters(guest)
    await guest.write(2 * table + 9 * CLUSTER, SECTOR)
    await guest.resize(7 * CLUSTER + SECTOR)
    assert guest.may_fail or end_of_clusters(guest) < full, "the tail is still there"
    await guest.write_back()
    for cluster in (0, 3, 4, 5, 6):
        await guest.write(cluster * CLUSTER + SECTOR, SECTOR)
    await guest.flush()
    await guest.resize(3 * table)
    await guest.write(table + 2 * CLUSTER + SECTOR, SECTOR)
    await guest.write_back()
    await guest.write(2 * table + CLUSTER, SECTOR)
    await guest.flush()
    await guest.resize(2 * table)
    await guest.resize(SECTOR)
    await guest.close()


async def cut_what_is_mixed(guest: Guest) -> None:
    """What is cut off lies among what stays: holes, but for the very end of the file."""
    table = guest.image.geometry.l2_coverage
    await guest.write(2 * table, SECTOR)
    await guest.write(CLUSTER, CLUSTER)
    await guest.write(2 * table + CLUSTER, CLUSTER)
    await guest.flush()
    await guest.write(table + CLUSTER, SECTOR)
    await guest.write(3 * CLUSTER, CLUSTER)
    await guest.write(5 * CLUSTER, CLUSTER)
    await guest.write(2 * table + 2 * CLUSTER, CLUSTER)
    await guest.resize(4 * CLUSTER)
    await guest.write(2 * CLUSTER + SECTOR, SECTOR)
    await guest.write_back()
    await guest.resize(3 * table)
    await guest.write(2 * table + CLUSTER + SECTOR, SECTOR)
    await guest.flush()
    await guest.resize(2 * CLUSTER)
    await guest.close()


async def cut_and_fill_again(guest: Guest) -> None:
    """Without a flush in between, so that the file still leads to the old tables."""
    table = await fill_tables(guest)
    await guest.resize(table + 2 * CLUSTER)
    await guest.resize(3 * table)
    await guest.write(2 * table + CLUSTER + SECTOR, SECTOR)
    await guest.resize(2 * table)
    await guest.write(2 * table + CLUSTER + 3 * SECTOR, SECTOR)  # past the end
    await guest.write_back()
    await guest.resize(CLUSTER)
    await guest.write_back()
    await guest.resize(2 * table)
    await guest.write(table + CLUSTER, 2 * SECTOR)
    await guest.write_back()
    await guest.close()


async def zero_tables(guest: Guest) -> None:
    """Whole tables are zeroed: settled ones, one that waits to be written, one that was never there."""
    table = await fill_tables(guest)
    await guest.flush()
    used = end_of_clusters(guest)
    await guest.zero(0, 2 * table)
    await guest.write(CLUSTER + SECTOR, SECTOR)
    await guest.write_back()
    await guest.write_back()
    assert guest.may_fail or end_of_clusters(guest) == used, "it has taken other clusters"
    await guest.write(3 * CLUSTER, SECTOR)
    await guest.write(5 * CLUSTER, SECTOR)
    await guest.write(table + 8 * CLUSTER, SECTOR)
    await guest.zero(table, table)
    await guest.flush()
    await guest.discard(0, 3 * table)
    await guest.write(2 * table + SECTOR, SECTOR)
    await guest.write_back()
    await guest.close()


async def tables_among_tasks(guest: Guest) -> None:
    """Tables go and come while commits run and somebody asks for the map, who holds no lock."""
    table = await fill_tables(guest)
    await guest.flush()

    async def ask() -> None:
        try:
            async for _entry in map_image(guest.image):
                pass
        except OSError:
            assert guest.may_fail

    jobs: list[list[Callable[[], Awaitable[None]]]] = [
        [ask, guest.write_back, lambda: guest.resize(table), guest.flush, ask],
        [lambda: guest.resize(3 * table), guest.write_back, lambda: guest.write(table + 3 * CLUSTER, SECTOR), ask],
        [guest.flush, lambda: guest.write(table + CLUSTER, SECTOR), lambda: guest.zero(table, table), guest.write_back],
        [ask, lambda: guest.zero(table, 2 * table), lambda: guest.write(2 * table, SECTOR), guest.write_back],
        [guest.write_back, lambda: guest.discard(0, table), lambda: guest.write(5 * CLUSTER, SECTOR), ask],
    ]
    for job in jobs * 2:
        async with trio.open_nursery() as nursery:
            for step in job:
                nursery.start_soon(step)
    await guest.close()


TABLE_SCENARIOS: list[Scenario] = [cut_tables, cut_what_is_mixed, cut_and_fill_again, zero_tables, tables_among_tasks]


async def run_tables(scenario: Scenario, backing: str, *, chaos: Chaos | None = None) -> Run:
    below, flat = raw_below(BELOW[backing]) if BELOW[backing] else ([], b"")
    if scenario is tables_among_tasks:
        chaos = Chaos(SEED)
    return await Run.of(scenario, size=TABLES * TINY.l2_coverage, below=below, flat=flat, chaos=chaos)
