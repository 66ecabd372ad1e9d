"""A conversion in place from qcow2 that crashes, fails or is cancelled, anywhere: the file is the old image or the new
one and reads the same; then it is finished, and in a second run taken back."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest
import trio

from qedfuse.chain.unfinished import Step, Unfinished, UnfinishedError
from qedfuse.qed.header import MAGIC
from qedfuse.tools.in_place.apply import GO_ON, GO_ON_OR_BACK, InPlace
from qedfuse.tools.in_place.plan import Wanted
from tests.helpers.doubles.faults import Fault
from tests.helpers.doubles.image_ram import Ram, states_of
from tests.helpers.doubles.ram import Chaos
from tests.helpers.doubles.ram_journal import RamJournal
from tests.helpers.images.check_images import count
from tests.helpers.images.qcow2_images import create, noise, qemu_io
from tests.helpers.images.qcow2_in_place import in_ram, look
from tests.helpers.judges.in_place import silent

KIB = 1 << 10
SIZE = 2300 * KIB
#: Tables that map 2 MiB: two of them.
WANTED = Wanted(table_size=1)
BELOW = noise(300 * KIB, 7)
#: What a file and its journal are at some moment.
State = tuple[bytes, Unfinished | None]


@pytest.fixture(scope="module", params=["alone", "overlay"])
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes | None]:
    """An image with some of everything, and what is below it, by a name that the first sector has no room for."""
    image = tmp_path_factory.mktemp("old") / "a.qcow2"
    base = None
    if request.param != "alone":
        base = image.parent / (f"../{image.parent.name}/" * 100) / "base"
        base.write_bytes(BELOW)
    create(image, SIZE, "cluster_size=4k", backing=base)
    qemu_io(image, "write -P 1 0 40k", "write -z 64k 12k", "write -c -P 3 100k 4k", "write -c -P 4 104k 4k")
    qemu_io(image, "write -P 5 200k 10k", "discard 8k 8k", "write -P 6 2290k 10k")
    return image.read_bytes(), BELOW if base else None


def read(raw: bytes, below: bytes | None) -> tuple[bytes, str | None]:
    return trio.run(look, raw, below)


def converted(raw: bytes, fault: Fault | None = None) -> tuple[Ram, RamJournal]:
    storage = Ram(raw, fault)
    journal = RamJournal(storage.clock)
    trio.run(in_ram(storage, journal).begin, WANTED, silent)
    return storage, journal


def states(storage: Ram, journal: RamJournal, samples: int) -> Iterator[State]:
    """What a crash at any moment leaves, each once."""
    rng, seen = random.Random(1), set()
    since = 0
    for point in storage.crash_points():
        until = point.when if since or not storage.log else storage.log[0].when - 1
        for raw in states_of(point, rng, samples):
            for note in journal.between(since, until):
                if (raw, note) not in seen:
                    seen.add((raw, note))
                    yield raw, note
        since = until


def expect_new(storage: Ram, journal: RamJournal) -> None:
    """The file is the new image, and there is nothing left to do."""
    assert journal.read() is None
    found = count(storage.raw)
    assert found.corruptions == found.unreferenced == 0


def finish(state: State) -> tuple[Ram, RamJournal]:
    raw, note = state
    storage = Ram(raw)
    journal = RamJournal(storage.clock, note)
    work = in_ram(storage, journal)
    if note is not None:
        trio.run(work.go_on, note, WANTED, silent)
    elif not raw.startswith(MAGIC):
        trio.run(work.begin, WANTED, silent)
    expect_new(storage, journal)
    return storage, journal


def undo(state: State, old: bytes) -> tuple[Ram, RamJournal]:
    """But for the name of a backing file, in what has no meaning, all bytes are as before."""
    raw, note = state
    storage = Ram(raw)
    journal = RamJournal(storage.clock, note)
    if note is None:
        return storage, journal
    if note.step is Step.FINISH:
        with pytest.raises(UnfinishedError, match="taken back no more"):
            trio.run(in_ram(storage, journal).take_back, note)
        assert storage.raw == raw
        return storage, journal
    trio.run(in_ram(storage, journal).take_back, note)
    assert journal.read() is None
    assert storage.raw[4096:] == old[4096:] and storage.raw[:512] == old[:512]
    return storage, journal


def test_a_crash_anywhere(old: tuple[bytes, bytes | None]) -> None:
    raw, below = old
    expected = read(raw, below)
    storage, journal = converted(raw)
    expect_new(storage, journal)
    tried = 0
    for state in states(storage, journal, 20):
        tried += 1
        assert read(state[0], below) == expected
        assert read(finish(state)[0].raw, below) == expected
        assert read(undo(state, raw)[0].raw, below) == expected
    print(f"figures: {tried} states after a crash, each finished and taken back")
    assert tried > 50


def test_a_second_crash(old: tuple[bytes, bytes | None]) -> None:
    """While it is finished, or taken back."""
    raw, below = old
    expected = read(raw, below)
    rng = random.Random(2)
    first = list(states(*converted(raw), 1))
    tried = 0
    for state in rng.sample(first, min(len(first), 12)):
        for again in (*states(*finish(state), 0), *states(*undo(state, raw), 0)):
            tried += 1
            assert read(again[0], below) == expected
            assert read(finish(again)[0].raw, below) == expected
            assert read(undo(again, raw)[0].raw, below) == expected
    print(f"figures: {tried} states after a second crash")
    assert tried > 40


async def no_sync(_storage: Ram) -> None:
    await trio.lowlevel.checkpoint()


def test_the_crash_test_bites(old: tuple[bytes, bytes | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without syncs, some crash does harm, and the harness sees it."""
    raw, below = old
    expected = read(raw, below)
    with monkeypatch.context() as patched:
        patched.setattr(Ram, "sync", no_sync)
        storage, journal = converted(raw)
    wrong = 0
    for state in states(storage, journal, 3):
        try:
            wrong += read(state[0], below) != expected
        except OSError:
            wrong += 1
    assert wrong


#: How the calls of each kind fail: errno, and before, half-way or after the deed.
WAYS = {
    "read": [(errno.EIO, "before")],
    "seek": [(errno.EIO, "before")],
    "write": [(errno.ENOSPC, "before"), (errno.EIO, "half"), (errno.EIO, "after")],
    "header": [(errno.EIO, "before"), (errno.EIO, "after")],
    "truncate": [(errno.ENOSPC, "before"), (errno.EIO, "after")],
    "punch": [(errno.EIO, "before"), (errno.EIO, "after")],
    "sync": [(errno.EIO, "before"), (errno.EIO, "after")],
}


def begun(work: InPlace) -> OSError | None:
    """How a conversion fails, if it does."""
    try:
        trio.run(work.begin, WANTED, silent)
    except OSError as error:
        return error
    return None


def test_every_call_fails_once(old: tuple[bytes, bytes | None]) -> None:
    """The message tells what is true, and what it says can be done."""
    raw, below = old
    expected = read(raw, below)
    calls = converted(raw)[0].calls
    endings = set()
    for number, kind in enumerate(calls):
        for code, when in WAYS[kind]:
            storage = Ram(raw, Fault(number, code, when))
            journal = RamJournal(storage.clock)
            work = in_ram(storage, journal)
            if begun(work) is None:
                expect_new(storage, journal)  # what had been moved until then has made room for the rest
                continue
            endings.add(work.ending)
            state = storage.raw, journal.read()
            assert read(state[0], below) == expected
            if "unchanged" in work.ending:
                assert state == (raw, None)
            elif work.ending == GO_ON_OR_BACK:
                assert read(undo(state, raw)[0].raw, below) == expected
            else:
                assert work.ending == GO_ON
            assert read(finish(state)[0].raw, below) == expected
    print(f"figures: {len(calls)} calls, each failed")
    assert endings == {"ram.qed is unchanged", GO_ON_OR_BACK, GO_ON}


def test_cancelled_anywhere(old: tuple[bytes, bytes | None]) -> None:
    raw, below = old
    expected = read(raw, below)

    async def cancelled_after(storage: Ram, journal: RamJournal, checkpoints: int) -> bool:
        async def count_down() -> None:
            for _ in range(checkpoints):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_down)
            await in_ram(storage, journal).begin(WANTED, silent)
            nursery.cancel_scope.cancel()
            return False
        return True

    checkpoints, cancelled = 0, True
    while cancelled:
        storage = Ram(raw, chaos=Chaos(1, refuse=1, split=0))
        journal = RamJournal(storage.clock)
        cancelled = trio.run(cancelled_after, storage, journal, checkpoints)
        state = storage.raw, journal.read()
        assert read(state[0], below) == expected
        assert read(finish(state)[0].raw, below) == expected
        assert read(undo(state, raw)[0].raw, below) == expected
        checkpoints += 3
    assert checkpoints > 30
