"""An image on a block device: crashes, faults and a full device, on a storage that cannot grow and is full of stale
bytes, which look like entries of tables."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable
from pathlib import Path

import pytest
import trio

from qedfuse.check.check import Repair, check_image
from qedfuse.errors import QedfuseError
from qedfuse.qed import file_growth as growing
from qedfuse.qed.allocator import Allocator, HostRun
from qedfuse.qed.cluster_map import ClusterMap
from qedfuse.qed.file_growth import DeviceGrowth
from qedfuse.qed.reserve import Reserve
from qedfuse.sizes import HostOffset, PageIndex
from tests.helpers.doubles.crash import SEED, CrashStorage
from tests.helpers.doubles.faults import Fault
from tests.helpers.doubles.ram import RamFile, RamStorage
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.images.check_images import Builder, count
from tests.helpers.images.images import (
    TINY,
    Chain,
    assert_sound,
    contents,
    new_chain,
    on_device,
    open_chain,
    raw_file,
    read_header,
    repaired,
)
from tests.helpers.images.scenarios import (
    BELOW,
    CLUSTER,
    SCENARIOS,
    SIZE,
    allocate,
    churn,
    concurrent,
    dirty_end,
    go_on,
    reuse,
    shrink_and_grow,
)
from tests.helpers.judges.expect import raises_errno
from tests.helpers.judges.history import SECTOR, Guest, History
from tests.helpers.judges.survival import Run, Scenario, raw_below
from tests.helpers.judges.trials import FAULTS, Trial

DEVICE = 48 * CLUSTER + SECTOR


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster is zeroed when it is needed, and no sooner: it is the more often looked at."""
    monkeypatch.setattr(growing, "_ZERO_MIN", CLUSTER)
    monkeypatch.setattr(growing, "_ZERO_MAX", CLUSTER)


async def chain_on_device(backing: str, size: int = DEVICE) -> tuple[Chain, bytes]:
    """A fresh image on a device, and what it reads as."""
    below, flat = raw_below(BELOW[backing]) if BELOW[backing] else ([], b"")
    chain = await new_chain(SIZE, TINY, below)
    return Chain(on_device(chain.file, size), below), flat[:SIZE].ljust(SIZE, b"\0")


async def run_on_device(scenario: Scenario, backing: str) -> Run:
    chain, flat = await chain_on_device(backing)
    return await Run.of(scenario, size=SIZE, flat=flat, start=chain)


@pytest.mark.parametrize("backing", ["alone", "shorter"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_crash(scenario: Scenario, backing: str, tmp_path: Path) -> None:
    async def main() -> None:
        run = await run_on_device(scenario, backing)
        await assert_sound(run.storage.file)
        await run.enumerate(random.Random(SEED), complete=128, samples=600, directory=tmp_path, ask_qemu=1)
        assert run.tried > 20

    run_seeded(SEED, main)


def test_repair_and_after() -> None:
    """Crashes while an unclean image is being repaired, and in the writes after that."""

    async def main() -> None:
        first = await run_on_device(dirty_end, "alone")
        *_, point = first.storage.crash_points()
        rnd = random.Random(SEED)
        tried = 0
        for _ in range(20):
            file = point.some_state(rnd)
            if not read_header(file).needs_check:
                continue
            fixed = Chain(file.fork(), [])
            await (await open_chain(fixed)).close()
            run = await Run.of(go_on, size=SIZE, flat=await contents(fixed), start=Chain(file, []))
            await run.enumerate(rnd, complete=64, samples=20)
            tried += run.tried
        assert tried > 100

    run_seeded(SEED, main)


# -- it bites ---------------------------------------------------------------------------------------------------------


def expect_failure(scenario: Scenario, backing: str) -> None:
    async def main() -> None:
        run = await run_on_device(scenario, backing)
        await run.enumerate(random.Random(SEED), complete=1024, samples=2000)

    with pytest.raises(AssertionError, match=r"reads as|lies|used more than once|overlaps|aligned|mapped"):
        run_seeded(SEED, main)


@pytest.mark.parametrize("backing", ["alone", "shorter"])
def test_stale_bytes(monkeypatch: pytest.MonkeyPatch, backing: str) -> None:
    """Handed out as they are."""

    async def broken(self: DeviceGrowth, runs: list[HostRun]) -> None:
        self._allocator.put_free(runs)

    monkeypatch.setattr(DeviceGrowth, "_zero", broken)
    expect_failure(allocate, backing)


def test_zeroes_that_are_not_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backing file, the barrier would do."""

    async def broken(self: DeviceGrowth, runs: list[HostRun]) -> None:
        for run in runs:
            await self._storage.punch(*run)
        self._allocator.put_free(runs)

    monkeypatch.setattr(DeviceGrowth, "_zero", broken)
    expect_failure(allocate, "alone")


def test_what_is_in_use_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reserve misses what tables refer to."""
    monkeypatch.setattr(ClusterMap, "mark_entries", lambda *_: None)

    async def main() -> None:
        chain, _flat = await chain_on_device("alone")
        image = await open_chain(chain)
        await image.write(0, b"1" * 4 * CLUSTER)
        await image.close()
        image = await open_chain(chain)
        for number in range(12):
            await image.write(number * CLUSTER, b"2" * CLUSTER)
        await image.close()
        monkeypatch.undo()
        await assert_sound(chain.file)

    with pytest.raises(AssertionError, match="used more than once"):
        trio.run(main)


# -- a killed daemon --------------------------------------------------------------------------------------------------


def test_tables_that_are_younger_than_the_disk() -> None:
    """A daemon was killed when it had given up a cluster (the host could not punch), but before that was durable. The
    next one must not zero the cluster before it is: the entry on the disk still leads there."""

    rnd = random.Random(SEED)

    async def main() -> None:
        chain, flat = await chain_on_device("shorter", 9 * CLUSTER)  # header, L1, one table, four clusters
        history = History(flat)
        storage = CrashStorage("image", chain.file.fork(), history)
        guest = Guest(await open_chain(chain, storage), history, CLUSTER)
        await guest.write(0, 4 * CLUSTER)
        await guest.flush()
        storage.punches = False
        await guest.zero(CLUSTER, CLUSTER)
        storage.punches = True
        image = guest.image
        page = image.tables.page_nowait(PageIndex(0))
        assert page is not None
        await storage.write(image.tables.l2.hosts[0], [bytes(page)])  # the commit's step 4, and the end
        guest = Guest(await open_chain(chain, storage), history, CLUSTER, tag=100)
        await guest.write(6 * CLUSTER, CLUSTER)  # there is room for one
        assert await is_full(guest.write(7 * CLUSTER, CLUSTER))
        await guest.flush()
        run = Run(chain, history, storage, TINY)
        run.watch()
        for point in storage.crash_points():
            for _ in range(100):
                await run.survive(point.some_state(rnd), point)

    run_seeded(SEED, main)


# -- full -------------------------------------------------------------------------------------------------------------


async def is_full(what: Awaitable[None]) -> bool:
    """Whether it ends with ENOSPC."""
    try:
        await what
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return True
    return False


@pytest.mark.parametrize("room", [0, 1, 2, 3, 8, 12])
@pytest.mark.parametrize("backing", ["alone", "shorter"])
def test_up_to_the_end(room: int, backing: str) -> None:
    """Every cluster is used, then ENOSPC; what was zeroed is written again where it was; the rest goes on."""

    async def main() -> None:
        chain, flat = await chain_on_device(backing, (3 + room) * CLUSTER + SECTOR)
        image = await open_chain(chain)
        model = bytearray(flat)
        written = 0
        for number in range(12):
            data = bytes([number + 1]) * CLUSTER
            if not await is_full(image.write(number * CLUSTER, data)):
                model[number * CLUSTER : (number + 1) * CLUSTER] = data
                written += 1
        assert written == min(12, max(0, room - 2))  # a table takes two
        await image.flush()
        assert await image.read(0, SIZE) == model
        if written:
            await image.write(SECTOR, b"in place")
            model[SECTOR : SECTOR + 8] = b"in place"
            await image.zero(0, CLUSTER)
            model[:CLUSTER] = bytes(CLUSTER)
            if written < 12:
                assert await is_full(image.write(11 * CLUSTER, b"not for others"))
            await image.write(100, b"again" * 100)
            model[100:600] = b"again" * 100
        await image.close()
        result = await assert_sound(chain.file)
        assert result.image_end_offset <= chain.file.size
        assert await contents(chain) == model

    trio.run(main)


def test_a_write_that_does_not_fit() -> None:
    """One request over the end of the space: the front of it may be there, and nothing is broken."""

    async def main() -> None:
        chain, _flat = await chain_on_device("alone", 9 * CLUSTER)
        image = await open_chain(chain)
        assert await is_full(image.write(0, b"x" * 12 * CLUSTER))
        await image.close()
        await assert_sound(chain.file)
        image = await open_chain(chain)
        assert await image.read(0, 4 * CLUSTER) == b"x" * 4 * CLUSTER
        await image.close()

    trio.run(main)


async def free_in_between(chain: Chain) -> int:
    """The clusters before the last one in use to which nothing refers. On a device they are not leaked."""
    result = await assert_sound(chain.file)
    return count(chain.file.read(0, result.image_end_offset)).unreferenced


def test_space_in_between() -> None:
    """Clusters that leaked, such as those that were discarded where the host cannot punch, are used when the end is
    reached, and a table finds its run among them."""

    async def main() -> None:
        chain, flat = await chain_on_device("alone", 18 * CLUSTER)
        model = bytearray(flat)

        async def write(number: int) -> None:
            await image.write(number * CLUSTER, bytes([number + 1]) * CLUSTER)
            model[number * CLUSTER : (number + 1) * CLUSTER] = bytes([number + 1]) * CLUSTER

        storage = RamStorage("image", chain.file)
        image = await open_chain(chain, storage)
        for number in range(12):
            await write(number)
        storage.punches = False
        for number in (2, 5, 6, 7):
            await image.discard(number * CLUSTER, CLUSTER)
            model[number * CLUSTER : (number + 1) * CLUSTER] = bytes(CLUSTER)
        await image.close()
        assert await free_in_between(chain) == 4
        image = await open_chain(chain)
        await image.resize(TINY.l2_coverage + CLUSTER)
        await write(2)
        await image.write(12 * CLUSTER, b"a" * CLUSTER)
        await image.write(TINY.l2_coverage, b"b" * CLUSTER)  # and a table of two clusters: 5 and 6, or 6 and 7
        assert await is_full(write(5))
        await image.flush()
        assert await image.read(0, 12 * CLUSTER) == model[: 12 * CLUSTER]
        assert await image.read(12 * CLUSTER, CLUSTER) == b"a" * CLUSTER
        assert await image.read(TINY.l2_coverage, CLUSTER) == b"b" * CLUSTER
        await image.close()
        assert await free_in_between(chain) == 0

    trio.run(main)


def test_no_room_for_a_table() -> None:
    """Free clusters, but no two of them together: ENOSPC, and the cluster of data comes back."""

    async def main() -> None:
        chain, _flat = await chain_on_device("alone", 17 * CLUSTER)
        image = await open_chain(chain)
        await image.write(0, b"x" * 12 * CLUSTER)
        await image.close()
        image = await open_chain(chain, RamStorage("image", chain.file, punches=False))
        for number in (1, 3, 5):
            await image.discard(number * CLUSTER, CLUSTER)
        await image.close()
        image = await open_chain(chain)
        await image.resize(TINY.l2_coverage + CLUSTER)
        assert await is_full(image.write(TINY.l2_coverage, b"y" * CLUSTER))
        for number in (1, 3, 5):
            await image.write(number * CLUSTER, b"x" * CLUSTER)
        assert await image.read(0, 12 * CLUSTER) == b"x" * 12 * CLUSTER
        await image.close()
        await assert_sound(chain.file)

    trio.run(main)


@pytest.mark.parametrize("seed", range(8))
def test_at_random(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything, on a device with little room, opened again and again; what fails fails with ENOSPC."""
    monkeypatch.setattr(growing, "_ZERO_MAX", (1 + seed % 3) * CLUSTER)

    async def main() -> None:
        rnd = random.Random(seed)
        backing = list(BELOW)[seed % len(BELOW)]
        chain, flat = await chain_on_device(backing, (8 + seed) * CLUSTER)
        model, full = bytearray(flat), 0
        for _ in range(6):
            image = await open_chain(chain)
            for _ in range(25):
                offset, size = rnd.randrange(SIZE - 2 * CLUSTER), rnd.choice([7, SECTOR, CLUSTER, 2 * CLUSTER])
                data = rnd.randbytes(size) if rnd.random() < 0.6 else bytes(size)
                if not await is_full(image.write(offset, data) if any(data) else image.zero(offset, size)):
                    model[offset : offset + size] = data
                else:
                    full += 1
                    now = await image.read(offset, size)
                    assert all(byte in (old, new) for byte, old, new in zip(now, model[offset:], data, strict=False))
                    model[offset : offset + size] = now
                if rnd.random() < 0.1:
                    await image.flush()
                assert await image.read(0, SIZE) == model
            await image.close()
            await assert_sound(chain.file)
        assert full or seed > 5

    run_seeded(seed, main)


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backing", ["alone", "shorter"])
@pytest.mark.parametrize("scenario", [allocate, churn, concurrent, reuse, shrink_and_grow], ids=lambda s: s.__name__)
def test_every_call_fails_once(scenario: Scenario, backing: str) -> None:
    rnd = random.Random(SEED)

    async def one(fault: Fault | None) -> Trial:
        chain, flat = await chain_on_device(backing)
        trial = Trial(chain, flat, fault)
        await trial.run(scenario)
        if fault and fault.hit:
            if fault.hit == "punch":  # of a cluster to be handed out: the writer is told, as of any other error
                trial.errors = [error for error in trial.errors if error.errno != fault.errno]
            await trial.judge(rnd, shared=scenario is concurrent)
        return trial

    fine = run_seeded(SEED, one, None)
    assert not fine.errors
    assert {"read", "write", "sync", "punch"} <= set(fine.storage.calls) and "truncate" not in fine.storage.calls
    for call in range(len(fine.storage.calls)):
        run_seeded(SEED, one, Fault(call, *FAULTS[call % len(FAULTS)]))


def test_what_could_not_be_zeroed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The space is not lost by it."""
    failures = 3

    async def fail(self: RamStorage, offset: int, size: int) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError(errno.EIO, "no")
        await original(self, offset, size)

    original = RamStorage.punch
    monkeypatch.setattr(RamStorage, "punch", fail)

    async def main() -> None:
        chain, _flat = await chain_on_device("alone", 6 * CLUSTER)  # room for one
        image = await open_chain(chain)
        for _ in range(3):
            with raises_errno(errno.EIO):
                await image.write(0, b"x")
        await image.write(0, b"x")
        await image.close()
        await assert_sound(chain.file)

    trio.run(main)


def test_tables_that_overlap() -> None:
    """Nothing can be allocated, since nobody knows what is free; what needs no cluster goes on; a repair helps."""
    image = Builder()
    table = image.table(0)
    data = image.data(table, 0, 1, 2)
    image.set_l1(1, table)
    file = on_device(raw_file(bytes(image.raw)), 40 * CLUSTER)

    async def main() -> None:
        chain = Chain(file, [])
        top = await open_chain(chain)
        await top.write(0, b"in place")
        await top.write(CLUSTER, bytes(CLUSTER // 2))
        for offset in (5 * CLUSTER, image.header.image_size - CLUSTER):
            with pytest.raises(QedfuseError, match="which clusters are free: its tables overlap; see qedfuse check"):
                await top.write(offset, b"x")
        await top.close()
        storage = RamStorage("device", file)
        result = await check_image(storage, read_header(file), repair=Repair.ALL)
        assert result.corruptions_fixed and not result.corruptions and not result.leaks
        top = await open_chain(chain)
        assert (await top.read(0, 8)) == b"in place"
        await top.write(5 * CLUSTER, b"x")
        assert await top.read(5 * CLUSTER, 2) == b"x\0"
        await top.close()
        await assert_sound(file)
        assert len(data) == 3

    trio.run(main)


def test_no_room_to_repair() -> None:
    """ENOSPC, and nothing is changed."""
    image = Builder()
    table = image.table(0)
    image.data(table, 0, 1, 2)
    image.set_l1(1, table)
    file = on_device(raw_file(bytes(image.raw)), len(image.raw) + 4 * CLUSTER)  # needed: a table's 2 and 3

    async def main(file: RamFile) -> int | None:
        before = file.key()
        try:
            await check_image(RamStorage("device", file), read_header(file), repair=Repair.ALL)
        except OSError as error:
            assert file.key() == before
            return error.errno
        return None

    assert trio.run(main, file) == errno.ENOSPC
    assert trio.run(main, on_device(raw_file(bytes(image.raw)), len(image.raw) + 5 * CLUSTER)) is None


def test_crashes_in_a_repair() -> None:
    """What is referenced twice gets its copy among the stale bytes. After a crash another repair finishes."""
    image = Builder(image_size=2 * 1024 * CLUSTER)
    table = image.table(0)
    image.data(table, 0, 1, 2)
    image.set_l1(1, table)
    start = on_device(raw_file(bytes(image.raw)), len(image.raw) + 8 * CLUSTER)

    async def main() -> None:
        wanted = await contents(Chain(start.fork(), []))
        storage = CrashStorage("device", start.fork(), History(wanted))
        await repaired(storage, read_header(storage.file))
        assert await contents(Chain(storage.file, [])) == wanted
        rnd = random.Random(SEED)
        tried = set()
        for point in storage.crash_points():
            for _ in range(1 if not point.pending else 12):
                file = point.some_state(rnd)
                if file.key() in tried:
                    continue
                tried.add(file.key())
                assert await contents(Chain(file, [])) == wanted
                await repaired(RamStorage("device", file), read_header(file))
                assert await contents(Chain(file, [])) == wanted
                await assert_sound(file)
        assert len(tried) > 20

    run_seeded(SEED, main)


def test_reserve_runs() -> None:
    """Behind everything first, then the gaps, each cluster once; a long run is found among short ones."""
    image = Builder()
    table = image.table(0)
    for entry in range(8):
        image.data(table, entry)
        image.junk(entry % 3)
    image.data(table, 8)
    raw = bytes(image.raw)

    async def main() -> None:
        file = on_device(raw_file(raw), len(raw) + 3 * CLUSTER + SECTOR)
        reserve = Reserve(RamStorage("device", file, writable=False), read_header(file))
        await reserve.find()
        assert await reserve.take(2 * CLUSTER, 2 * CLUSTER) == [(len(raw), 2 * CLUSTER)]
        (long,) = await reserve.take(2 * CLUSTER, 2 * CLUSTER)
        assert long[0] < len(raw)
        rest = await reserve.take(CLUSTER, 1 << 30)
        free = {
            number for start, size in [*rest, long] for number in range(start // CLUSTER, (start + size) // CLUSTER)
        }
        junk = {at // CLUSTER for at in range(0, len(raw), CLUSTER) if raw[at : at + 4] == b"JUNK"}
        assert free == junk | {len(raw) // CLUSTER + 2}
        assert await reserve.take(CLUSTER, CLUSTER) == []
        reserve.put_back(rest[:1])
        assert await reserve.take(CLUSTER, CLUSTER) == rest[:1]

    trio.run(main)


def test_a_device_that_grows() -> None:
    """What it has gained is used when the image is opened anew, and not before."""

    async def main() -> None:
        chain, _flat = await chain_on_device("alone", 8 * CLUSTER)
        image = await open_chain(chain)
        chain.file.write(8 * CLUSTER, b"stale!!!" * (4 * CLUSTER // 8))  # the model of a device writes there
        assert chain.file.size == 12 * CLUSTER
        assert await is_full(image.write(0, b"x" * 12 * CLUSTER))
        await image.close()
        await assert_sound(chain.file)
        image = await open_chain(chain)
        for number in range(7):
            await image.write(number * CLUSTER, b"x" * SECTOR)
        assert await is_full(image.write(7 * CLUSTER, b"x"))
        assert await image.read(6 * CLUSTER, CLUSTER) == b"x" * SECTOR + bytes(CLUSTER - SECTOR)
        await image.close()
        await assert_sound(chain.file)

    trio.run(main)


def test_room() -> None:
    """How much there is: never less than what can be written."""

    async def main() -> None:
        chain, _flat = await chain_on_device("alone", 20 * CLUSTER + SECTOR)
        image = await open_chain(chain)
        assert image.room == 20 * CLUSTER + SECTOR  # it has not looked
        assert await image.measure_room() == 17 * CLUSTER == image.room
        await image.write(0, b"x" * 3 * CLUSTER)
        assert image.room == 12 * CLUSTER
        await image.discard(0, CLUSTER)
        await image.write(0, b"x" * CLUSTER)
        assert image.room == 12 * CLUSTER
        await image.write(3 * CLUSTER, b"x" * CLUSTER)
        assert image.room == 11 * CLUSTER
        await image.close()
        image = await open_chain(chain)
        assert await image.measure_room() == 11 * CLUSTER
        await image.close()
        plain = await open_chain(await new_chain(SIZE, TINY))
        assert plain.room is None and await plain.measure_room() is None
        await plain.close()

    trio.run(main)


def test_a_device_hands_out_only_what_is_free() -> None:
    allocator = Allocator(TINY, 10 * CLUSTER + SECTOR, fixed=True)
    assert allocator.end == 10 * CLUSTER
    assert allocator.next_free(10 * CLUSTER + SECTOR) == (10 * CLUSTER, 10 * CLUSTER)
    for ask in (lambda: allocator.allocate(1), allocator.allocate_table):
        with raises_errno(errno.ENOSPC):
            ask()
    allocator.put_free([(HostOffset(9 * CLUSTER), CLUSTER)])
    assert allocator.allocate(4) == (9 * CLUSTER, CLUSTER)
    allocator.take_back(HostOffset(9 * CLUSTER), CLUSTER)
    assert allocator.end == 10 * CLUSTER and allocator.trim() == 10 * CLUSTER
