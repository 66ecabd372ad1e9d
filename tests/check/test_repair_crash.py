"""A repair that crashes, fails or is cancelled, anywhere: the image is no worse, and a second repair finishes."""

from __future__ import annotations

import errno
import os
import random
from collections import Counter

import pytest
import trio

from qedfuse.check import repair as repair_module
from qedfuse.check.check import Repair, check_image
from qedfuse.check.result import CheckResult
from qedfuse.qed.header import FEATURE_NEED_CHECK
from tests.helpers.doubles.faults import Fault
from tests.helpers.doubles.image_ram import Ram
from tests.helpers.doubles.ram import Chaos
from tests.helpers.images.check_faults import (
    FAULTS,
    broken,
    dangling_where_copies_go,
    data_twice,
    many,
    nothing,
    table_twice,
)
from tests.helpers.images.check_faults import Fault as Damage
from tests.helpers.images.check_images import (
    contents,
    count,
    header_of,
    sound,
)
from tests.helpers.judges.check_tools import check_ram, expect_clean, expect_no_worse, shared_with_tables


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


@pytest.mark.parametrize("damage", FAULTS)
def test_a_crash_in_a_repair(damage: Damage) -> None:
    states = enumerate_crashes(broken(damage), seed=1, samples=3)
    assert (states > 1) is (damage is not nothing)
    print(f"{damage.__name__}: {states} states")


def test_a_crash_does_not_let_a_dangling_entry_see_a_copy() -> None:
    assert enumerate_crashes(broken(dangling_where_copies_go), seed=2, samples=10) > 1


@pytest.mark.parametrize("damage", [data_twice, table_twice, dangling_where_copies_go])
def test_the_crash_test_bites(damage: Damage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rulebook's syncs and its fence, some crash does harm, and the harness sees it."""

    async def no_fence(_self: object) -> None:
        await trio.lowlevel.checkpoint()

    if damage is dangling_where_copies_go:
        monkeypatch.setattr(repair_module._TableRepair, "fence", no_fence)
    else:
        monkeypatch.setattr(Ram, "sync", no_sync)
    with pytest.raises(AssertionError):
        enumerate_crashes(broken(damage), seed=3, samples=10)


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


#: How the calls of each kind fail: errno, and before, half-way or after the deed.
WAYS = {
    "read": [(errno.EIO, "before")],
    "seek": [(errno.EIO, "before")],
    "write": [(errno.EIO, "before"), (errno.ENOSPC, "before"), (errno.ENOSPC, "half"), (errno.EIO, "after")],
    "header": [(errno.EIO, "before"), (errno.ENOSPC, "before"), (errno.EIO, "after")],
    "truncate": [(errno.ENOSPC, "before"), (errno.EIO, "after")],
    "punch": [(errno.EIO, "before"), (errno.EIO, "half"), (errno.ENOSPC, "after")],
    "sync": [(errno.EIO, "before"), (errno.ENOSPC, "after")],
}
INJECTED: Counter[str] = Counter()


def outcome(storage: Ram, repair: Repair) -> CheckResult | int | None:
    """What a check finds, or the errno it fails with."""
    try:
        return check_ram(storage, repair)
    except OSError as error:
        return error.errno


@pytest.mark.parametrize("repair", [Repair.LEAKS, Repair.ALL])
@pytest.mark.parametrize("damage", [*FAULTS, dangling_where_copies_go])
def test_every_call_of_a_repair_fails_once(damage: Damage, repair: Repair) -> None:
    """The caller is told, the image is no worse, even if the power fails next, and a second repair finishes."""
    raw = broken(damage)
    before, shared, rng = contents(raw), shared_with_tables(raw), random.Random(5)
    whole = Ram(raw)
    finished = check_ram(whole, repair)
    calls = whole.calls
    assert calls
    tried: set[bytes] = set()
    finishes: set[bytes] = set()
    for number, kind in enumerate(calls):
        for code, when in WAYS[kind]:
            storage = Ram(raw, Fault(number, code, when))
            told = outcome(storage, repair)
            if told != code and code == errno.ENOSPC:  # what has been moved until then makes room for the rest
                assert isinstance(told, CheckResult) and kind in ("write", "header", "punch", "truncate")
                assert (told.corruptions, told.leaks) == (0, 0)
            elif told != code:  # the check counts tables that it cannot read, and then repairs nothing
                assert kind in ("read", "seek") and isinstance(told, CheckResult) and told.check_errors == 1
                assert any(os.strerror(code).lower() in problem for problem in told.problems)
            assert storage.fault and storage.fault.hit == kind
            INJECTED[kind] += 1
            for state in {bytes(storage.raw), *(storage.crashes_now(rng, 1) if storage.log else [])} - tried:
                tried.add(state)
                expect_no_worse(state, before, shared)
            if bytes(storage.raw) not in finishes:
                finishes.add(bytes(storage.raw))
                again = check_ram(storage, repair)
                assert (again.corruptions, again.leaks) == (finished.corruptions, finished.leaks)
                if repair is Repair.ALL:
                    expect_clean(storage)


def test_how_many_faults() -> None:
    """Says it; and when all of the above ran, it were many."""
    print(f"figures: {INJECTED.total()} faults in repairs, by call: {dict(INJECTED)}")
    assert not INJECTED or INJECTED.total() > 2000 or len(INJECTED) < len(WAYS)


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
        storage = Ram(raw, chaos=Chaos(1, refuse=1, split=0))
        cancelled = trio.run(cancelled_after, storage, checkpoints)
        expect_no_worse(bytes(storage.raw), contents(raw), shared_with_tables(raw))
        checkpoints += 3
    assert checkpoints > 30
