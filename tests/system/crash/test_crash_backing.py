"""Every crash while an image gets another backing file, its first one, or none: the guest reads the same in all states.

The content is the same before and after, as the caller of `set_backing` vouches; but never in the same way, so that a
state in which header and tables do not belong together reads as something else.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from qedfuse.errors import CorruptError
from qedfuse.qed import file_growth as growing
from qedfuse.qed.commit import Committer
from qedfuse.qed.header import HEADER_BYTES, Header
from tests.helpers.doubles.crash import SEED, STATES
from tests.helpers.doubles.ram import RamFile
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.images.images import Chain, backing_name, new_chain, raw_file
from tests.helpers.judges.history import SECTOR, Guest, fill
from tests.helpers.judges.survival import BAD, Run, Scenario

CLUSTER = 4096
CLUSTERS = 12
SIZE = CLUSTERS * CLUSTER
RAW = 7 * CLUSTER  # bytes of the backing file at the start
#: Names of what comes below later. QEMU opens none with more than 1023 bytes.
SHORT, LONG = "new", "./" * 500 + "new"

Below = list[tuple[RamFile, str]]


@pytest.fixture(autouse=True)
def growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file grows by what is needed, so that it often does."""
    monkeypatch.setattr(growing, "_GROW_CLUSTERS", 0)


def garbage(size: int = SIZE) -> Below:
    """What must never show."""
    return [(raw_file(fill(0xBAD, 0, size)), "raw")]


class Case:
    """An image over `below`, that has what is in `others` below it later."""

    def __init__(self, below: Below, flat: bytes) -> None:
        self.below = below
        self.flat = flat
        self.others: dict[str, Below] = {}

    async def put(self, guest: Guest, name: str) -> None:
        """Have what is called `name` below the image from now on; empty: nothing."""
        layer = Chain(RamFile(), self.others[name]).layer_below() if name else None
        self.others.setdefault(name, [])
        began = guest.history.tick()
        old = await guest.image.set_backing(layer, name)
        guest.history.flushed(began)  # a commit comes first
        if old is not None:
            await old.close()

    async def run(self, scenario: Scenario) -> Run:
        chain = await new_chain(SIZE, below=self.below)
        chain.others = self.others
        return await Run.of(scenario, size=SIZE, flat=self.flat, start=chain)


def over(size: int = RAW) -> Case:
    flat = fill(0xBACC, 0, size)
    return Case([(raw_file(flat), "raw")], flat)


async def fill_all(guest: Guest) -> None:
    """Every cluster gets data or zeroes of its own; the last ones are not in the file yet."""
    for cluster in range(CLUSTERS - 1):
        await guest.write(cluster * CLUSTER, CLUSTER)
        if cluster == 5:
            await guest.write_back()
    await guest.write(0, SECTOR)
    await guest.zero((CLUSTERS - 1) * CLUSTER, CLUSTER)


async def same_content() -> tuple[Case, Scenario]:
    """From one raw file to a QED image with the same content, by a long name, and on to a raw one."""
    case = over()
    image = await new_chain(RAW, below=case.below)
    case.others[LONG] = [*case.below, (image.file, "qed")]
    case.others[SHORT] = [(raw_file(case.flat + bytes(CLUSTER)), "raw")]

    async def scenario(guest: Guest) -> None:
        await guest.write(CLUSTER, SECTOR)
        await guest.zero(2 * CLUSTER, CLUSTER)
        await case.put(guest, LONG)
        await guest.write(3 * CLUSTER + SECTOR, SECTOR)
        await guest.zero(4 * CLUSTER, CLUSTER)
        await case.put(guest, SHORT)
        await guest.write(5 * CLUSTER, 2 * SECTOR)
        await guest.flush()
        await guest.close()

    return case, scenario


async def none_at_last() -> tuple[Case, Scenario]:
    """All is copied up, and the backing file goes."""
    case = over()

    async def scenario(guest: Guest) -> None:
        await fill_all(guest)
        await case.put(guest, "")
        await guest.zero(3 * CLUSTER, CLUSTER)
        await guest.write(SIZE + CLUSTER, SECTOR)  # grows: new tables and clusters without a barrier
        await guest.write_back()
        await guest.flush()
        await guest.write(SIZE + 2 * CLUSTER, SECTOR)
        await guest.close()

    return case, scenario


async def one_at_last() -> tuple[Case, Scenario]:
    """All has data of its own, and what comes below has something else everywhere."""
    case = Case([], b"")
    case.others[SHORT] = garbage()

    async def scenario(guest: Guest) -> None:
        await fill_all(guest)
        await guest.write((CLUSTERS - 1) * CLUSTER, SECTOR)  # a cluster without an entry would show what is below
        await case.put(guest, SHORT)
        await guest.zero(3 * CLUSTER, CLUSTER)
        await guest.write(SIZE + CLUSTER, SECTOR)
        await guest.write_back()
        await guest.flush()
        await guest.close()

    return case, scenario


async def zeroes_at_last() -> tuple[Case, Scenario]:
    """An image with holes gets a backing file of zeroes, and then data over it: with a barrier now."""
    case = Case([], b"")
    case.others[LONG] = [(RamFile(size=SIZE), "raw")]

    async def scenario(guest: Guest) -> None:
        await guest.write(CLUSTER, SECTOR)
        await guest.write_back()
        await guest.write(5 * CLUSTER, CLUSTER)
        await case.put(guest, LONG)
        await guest.write(2 * CLUSTER + SECTOR, SECTOR)
        await guest.write_back()
        await guest.write(7 * CLUSTER, CLUSTER)
        await guest.flush()
        await case.put(guest, "")
        await guest.write(9 * CLUSTER, SECTOR)
        await guest.close()

    return case, scenario


Make = Callable[[], Awaitable[tuple[Case, Scenario]]]
CASES: list[Make] = [same_content, none_at_last, one_at_last, zeroes_at_last]


async def enumerate_all(run: Run, directory: Path | None, samples: int) -> None:
    await run.enumerate(random.Random(SEED), complete=256, samples=samples, directory=directory, ask_qemu=6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_crash(case: Make, tmp_path: Path) -> None:
    async def main() -> None:
        made, scenario = await case()
        run = await made.run(scenario)
        await enumerate_all(run, tmp_path, min(STATES, 50_000) // 100)
        assert run.tried > 60 and run.complete_points > 10
        names = {backing_name(point.base) for point in run.storage.crash_points()}
        assert names == {*made.others, "below0" if made.below else ""}  # each was in the file, durably

    run_seeded(SEED, main)


# -- it bites ---------------------------------------------------------------------------------------------------------


def expect_failure(case: Make) -> None:
    async def main() -> None:
        made, scenario = await case()
        await enumerate_all(await made.run(scenario), None, 2000)

    with pytest.raises((AssertionError, CorruptError), match=BAD):
        run_seeded(SEED, main)


@pytest.mark.parametrize("case", [none_at_last, one_at_last], ids=lambda case: case.__name__)
def test_header_before_the_commit(monkeypatch: pytest.MonkeyPatch, case: Make) -> None:
    """What was written before is not durable when the header says that it is all there is."""
    original = Committer.replace_backing
    commit = Committer._commit

    async def broken(self: Committer, *arguments: object, **keywords: object) -> None:
        async def none(self: Committer, durable: bool) -> None:
            pass

        with monkeypatch.context() as patch:
            patch.setattr(Committer, "_commit", none)
            await original(self, *arguments, **keywords)  # type: ignore[arg-type]
        await commit(self, True)

    monkeypatch.setattr(Committer, "replace_backing", broken)
    expect_failure(case)


def test_name_over_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Header, "room_for_name", lambda *_: HEADER_BYTES)
    expect_failure(same_content)


def test_header_before_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: Committer, name: bytes, *, is_raw: bool, replaced: Callable[[], None]) -> None:
        await self.flush()
        offset = self.header.room_for_name(len(name), "image")
        await self._write_header(self.header.with_backing_file(offset, len(name), is_raw=is_raw))
        replaced()
        await self._storage.write(offset, [name])
        await self._sync()

    monkeypatch.setattr(Committer, "replace_backing", broken)
    expect_failure(same_content)


def test_barrier_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that has a backing file now is written as one without."""
    monkeypatch.setattr(Committer, "_barrier", property(lambda self: self._tables._header.has_backing_file))
    expect_failure(zeroes_at_last)
