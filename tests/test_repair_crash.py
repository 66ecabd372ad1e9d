"""A repair that crashes, fails or is cancelled, anywhere: the image is no worse, and a second repair finishes."""

from __future__ import annotations

import errno
import os
import random

import pytest
import trio

from qedfuse import repair as repair_module
from qedfuse.check import Repair, check_image
from qedfuse.header import FEATURE_NEED_CHECK
from tests.helpers.check_faults import (
    FAULTS,
    Fault,
    broken,
    dangling_where_copies_go,
    data_twice,
    leaks_in_the_middle,
    many,
    not_closed,
    table_twice,
    tables_overlap,
)
from tests.helpers.check_images import (
    CLUSTER,
    Ram,
    contents,
    count,
    header_of,
    mapping,
    readable,
    sound,
    table_clusters,
)
from tests.helpers.check_tools import (
    check_ram,
)


def expect_no_worse(raw: bytes, before: dict[int, bytes | None], shared: set[int]) -> None:
    """What could be read is still there in `raw`. `shared`: guest clusters that were also tables, which may change."""
    now = contents(raw)
    for cluster, content in before.items():
        if cluster in shared:
            continue
        if content is not None:
            assert now.get(cluster) == content, f"cluster {cluster} has changed"
        else:
            assert now.get(cluster) is None, f"cluster {cluster} could not be read, and now reads as something"
    assert not now.keys() - before.keys(), "data where there was none"
    storage = Ram(raw)
    check_ram(storage, Repair.ALL)
    assert count(storage.raw).corruptions == 0
    assert {c: now[c] for c in readable(now) if c not in shared} == {
        c: content for c, content in contents(storage.raw).items() if c not in shared
    }


def shared_with_tables(raw: bytes | bytearray) -> set[int]:
    tables = table_clusters(raw)
    return {cluster for cluster, offset in mapping(raw).items() if offset and offset // CLUSTER in tables}


def enumerate_crashes(raw: bytearray, seed: int, samples: int) -> int:
    storage = Ram(raw)
    check_ram(storage, Repair.ALL)
    before, shared, tried = contents(raw), shared_with_tables(raw), set()
    for state in storage.crashes(random.Random(seed), samples):
        if state not in tried:
            tried.add(state)
            expect_no_worse(state, before, shared)
    return len(tried)


async def no_sync(_storage: Ram) -> None:
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_crash_in_a_repair(fault: Fault) -> None:
    states = enumerate_crashes(broken(fault), seed=1, samples=3)
    print(f"{fault.__name__}: {states} states")


def test_a_crash_does_not_let_a_dangling_entry_see_a_copy() -> None:
    enumerate_crashes(broken(dangling_where_copies_go), seed=2, samples=10)


@pytest.mark.parametrize("fault", [data_twice, table_twice, dangling_where_copies_go])
def test_the_crash_test_bites(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rulebook's syncs and its fence, some crash does harm, and the harness sees it."""

    async def no_fence(_self: object) -> None:
        await trio.lowlevel.checkpoint()

    if fault is dangling_where_copies_go:
        monkeypatch.setattr(repair_module._TableRepair, "fence", no_fence)
    else:
        monkeypatch.setattr(Ram, "sync", no_sync)
    with pytest.raises(AssertionError):
        enumerate_crashes(broken(fault), seed=3, samples=10)


@pytest.mark.parametrize("synced", [True, False])
@pytest.mark.parametrize("repair", [Repair.LEAKS, Repair.ALL])
def test_what_is_released_was_released_durably(repair: Repair, synced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed daemon left entries of 0 that are not on the disk yet. Without syncs the test must see the harm."""
    image, tables, data = sound()
    image.raw[16] |= FEATURE_NEED_CHECK
    storage = Ram(image.raw)
    for entry, offset in ((5, data[0][5]), (702, data[2][-1])):
        table = tables[0] if entry == 5 else tables[2]
        assert storage.raw[table + 8 * entry : table + 8 * entry + 8] == offset.to_bytes(8, "little")
        trio.run(storage.write, table + 8 * entry, [bytes(8)])
    if not synced:
        monkeypatch.setattr(Ram, "sync", no_sync)
    assert check_ram(storage, repair).leaks_fixed == 2
    old, new = contents(image.raw), contents(storage.raw)
    wrong = 0
    for state in storage.crashes(random.Random(4), 20):
        now = contents(state)
        wrong += any(now.get(cluster) not in (old[cluster], new.get(cluster)) for cluster in old)
        wrong += not header_of(state).needs_check and count(state).corruptions > 0
    assert bool(wrong) == (not synced)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("fault", [many, dangling_where_copies_go, leaks_in_the_middle, not_closed, tables_overlap])
def test_every_operation_of_a_repair_fails_once(fault: Fault, code: int) -> None:
    raw = broken(fault)
    whole = Ram(raw)
    check_ram(whole, Repair.ALL)
    for number in range(len(whole.log)):
        storage = Ram(raw, fail_at=number)
        storage.error = code
        with pytest.raises(OSError, match=os.strerror(code)):
            check_ram(storage, Repair.ALL)
        expect_no_worse(bytes(storage.raw), contents(raw), shared_with_tables(raw))


def test_cancelled_anywhere() -> None:
    """Cancellation at every checkpoint of a repair: no worse, and a second repair finishes."""
    raw = broken(many)

    async def cancelled_after(storage: Ram, checkpoints: int) -> bool:
        async def count_down() -> None:
            for _ in range(checkpoints):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_down)
            await check_image(storage, header_of(raw), repair=Repair.ALL)
            nursery.cancel_scope.cancel()
            return False
        return True

    checkpoints, cancelled = 0, True
    while cancelled:
        storage = Ram(raw)
        cancelled = trio.run(cancelled_after, storage, checkpoints)
        expect_no_worse(bytes(storage.raw), contents(raw), shared_with_tables(raw))
        checkpoints += 3
    assert checkpoints > 30
