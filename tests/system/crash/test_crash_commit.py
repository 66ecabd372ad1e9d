"""Every crash while an overlay is committed into its base: of both files together, as each may have got some of what
was written to it.

The overlay reads the same in all states, its tables and the base's are in order, and the base needs no check. A second
commit finishes the work.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qedfuse.errors import CorruptError
from qedfuse.layers.layer import Layer
from qedfuse.layers.raw import RawLayer
from qedfuse.qed import commit as committing
from qedfuse.qed import emptying
from qedfuse.qed import file_growth as growing
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import Header
from qedfuse.qed.image import Image
from qedfuse.tools import commit
from tests.helpers.doubles.crash import SEED, STATES, CrashStorage, joint_points
from tests.helpers.doubles.ram import RamFile, RamStorage
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.images.images import (
    POOL,
    TINY,
    Chain,
    assert_qemu_agrees,
    assert_sound,
    contents,
    new_chain,
    open_chain,
    raw_file,
    read_header,
)
from tests.helpers.judges.history import SECTOR, Clock, fill

CLUSTER = 4096
SIZE = 20 * CLUSTER + 3 * SECTOR


@pytest.fixture(autouse=True, params=[0, 256], ids=["each write is committed", "all at once"])
def often(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The base grows by what is needed, and often."""
    monkeypatch.setattr(growing, "_GROW_CLUSTERS", 0)
    monkeypatch.setattr(committing, "MAX_DIRTY_PAGES", request.param)
    monkeypatch.setattr(commit, "_STEP", CLUSTER)


async def base_of(kind: str) -> list[tuple[RamFile, str]]:
    """What is below the overlay; of a QED base, what it has below it, too."""
    if kind == "shorter raw":
        return [(raw_file(fill(0xBA5E, 0, 11 * CLUSTER + SECTOR)), "raw")]
    if kind == "longer raw":
        return [(raw_file(fill(0xBA5E, 0, 30 * CLUSTER)), "raw")]
    lower = [(raw_file(fill(0x10, 0, 30 * CLUSTER)), "raw")] if kind == "qed over raw" else []
    chain = await new_chain(13 * CLUSTER, TINY if lower else Geometry(2 * CLUSTER, 2), lower)
    image = await open_chain(chain)
    await image.write(3 * CLUSTER + SECTOR, fill(0xBA5E, 0, 2 * CLUSTER))
    await image.zero(8 * CLUSTER, 2 * CLUSTER)
    await image.close()
    return [*lower, (chain.file, "qed")]


BASES = ["shorter raw", "longer raw", "qed", "qed over raw"]


@dataclass
class State:
    """The overlay's file and the base's; `lower`: what is below a QED base."""

    overlay: RamFile
    base: RamFile
    kind: str
    lower: list[tuple[RamFile, str]]

    def open(self, overlay: RamStorage | None = None, base: RamStorage | None = None) -> tuple[Image, commit.Base]:
        """The overlay as `commit_image` opens it."""
        overlay = overlay or RamStorage("image", self.overlay)
        base = base or RamStorage("base", self.base)
        layer: Layer
        target: commit.Base
        if self.kind == "raw":
            layer = RawLayer.open(base)
            target = commit.RawBase(base)
        else:
            below = Chain(RamFile(), self.lower).layer_below()
            layer = image = Image(base, read_header(base.file), below, writable=True, pool=POOL)
            target = commit.QedBase(image)
        return Image(overlay, read_header(overlay.file), layer, writable=False, pool=POOL), target

    @property
    def chain(self) -> Chain:
        return Chain(self.overlay, [*self.lower, (self.base, self.kind)])

    async def judge(self, flat: bytes) -> None:
        await assert_sound(self.overlay, leaks=True)
        if self.kind == "qed":
            await assert_sound(self.base, leaks=True)
            assert not read_header(self.base).needs_check
        found = await contents(self.chain)
        wrong = [at for at in range(0, SIZE, SECTOR) if found[at : at + SECTOR] != flat[at : at + SECTOR]]
        assert len(found) == SIZE and not wrong, f"the overlay reads as something else at {wrong}"

    async def commit_again(self, flat: bytes) -> None:
        overlay, base = self.open()
        await commit.write_down(overlay, base, keep=False)
        await overlay.close()
        await self.judge(flat)
        await assert_sound(self.overlay)
        header = read_header(self.overlay)
        assert self.overlay.size == header.l1_table_offset + header.geometry.table_bytes
        assert header.l1_table_offset == header.header_bytes
        assert await self.read_base() == flat

    async def read_base(self) -> bytes:
        """As far as the overlay reaches."""
        if self.kind == "raw":
            return self.base.read(0, SIZE)
        return (await contents(Chain(self.base, self.lower)))[:SIZE]


@dataclass
class Run:
    """A commit from its beginning to its end, on storages that keep a log."""

    kind: str
    lower: list[tuple[RamFile, str]]
    flat: bytes
    overlay: CrashStorage
    base: CrashStorage

    @classmethod
    async def of(cls, base: str, *, move_table: bool = False) -> Run:
        below = await base_of(base)
        chain = await new_chain(SIZE, below=below)
        image = await open_chain(chain)
        for cluster in (0, 2, 5, 12, 13, 18, 20):
            await image.write(cluster * CLUSTER + SECTOR, fill(0x0A, cluster * CLUSTER, 2 * SECTOR))
        await image.write(7 * CLUSTER, fill(0x0A, 0, CLUSTER))
        for cluster in (4, 9, 14):
            await image.zero(cluster * CLUSTER, CLUSTER)
        await image.zero(7 * CLUSTER, CLUSTER)  # a hole of the host
        await image.flush()
        flat = bytes(await image.read(0, SIZE))
        await image.close()
        if move_table:
            _move_table(chain.file)
        *lower, (file, kind) = below
        clock = Clock()
        overlay = CrashStorage("image", chain.file.fork(), clock)
        under = CrashStorage("base", file.fork(), clock)
        run = cls(kind, lower, flat, overlay, under)
        opened, target = State(overlay.file, under.file, kind, lower).open(overlay, under)
        await commit.write_down(opened, target, keep=False)
        await opened.close()
        return run

    def states(self, samples: int) -> Iterator[State]:
        rnd = random.Random(SEED)
        seen = set()
        for point in joint_points(self.overlay, self.base):
            for overlay, base in point.states(rnd, complete=256, samples=samples):
                key = overlay.key(), base.key()
                if key not in seen:
                    seen.add(key)
                    yield State(overlay, base, self.kind, self.lower)


def _move_table(file: RamFile) -> None:
    """Put the L1 table behind everything, as a conversion in place does, and where it was, something else."""
    header = read_header(file)
    size = header.geometry.table_bytes
    end = -(-file.size // CLUSTER) * CLUSTER
    file.write(end, file.read(header.l1_table_offset, size))
    file.write(header.l1_table_offset, fill(0xBAD, 0, size))
    file.write(0, replace(header, l1_table_offset=end).encode())


async def enumerate_all(run: Run, directory: Path | None, samples: int) -> int:
    tried = 0
    for state in run.states(samples):
        tried += 1
        await state.judge(run.flat)
        if directory and tried % 60 == 1:
            assert_qemu_agrees(state.chain, run.flat, directory, leaks=True)
        if tried % 5 == 1:
            await state.commit_again(run.flat)
    return tried


@pytest.mark.parametrize("move_table", [False, True], ids=["table first", "table last"])
@pytest.mark.parametrize("base", BASES)
def test_crash(base: str, move_table: bool, tmp_path: Path) -> None:
    async def main() -> None:
        run = await Run.of(base, move_table=move_table)
        await State(run.overlay.file, run.base.file, run.kind, run.lower).judge(run.flat)
        tried = await enumerate_all(run, tmp_path, min(STATES, 50_000) // 1000)
        print(f"figures: {tried} states")
        assert tried > 80

    run_seeded(SEED, main)


# -- it bites ---------------------------------------------------------------------------------------------------------


def expect_failure(base: str, why: str, *, move_table: bool = False) -> None:
    async def main() -> None:
        await enumerate_all(await Run.of(base, move_table=move_table), None, 20)

    with pytest.raises((AssertionError, CorruptError), match=why):
        run_seeded(SEED, main)


DIFFERS = "reads as something else"


@pytest.mark.parametrize("base", BASES)
def test_the_base_is_not_durable(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    async def broken(self: object) -> None:
        pass

    monkeypatch.setattr(commit.RawBase, "finish", broken)
    monkeypatch.setattr(commit.QedBase, "finish", broken)
    expect_failure(base, DIFFERS)


def test_a_base_that_is_not_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "keep_order", lambda self: None)
    expect_failure("qed", "outside the file|needs_check")


@pytest.mark.parametrize("move_table", [False, True])
def test_cut_before_the_entries_are_gone(monkeypatch: pytest.MonkeyPatch, move_table: bool) -> None:
    async def broken(storage: RamStorage, header: Header) -> None:
        await storage.punch(header.l1_table_offset, header.geometry.table_bytes)
        await storage.truncate(header.header_bytes + header.geometry.table_bytes)
        await storage.sync()

    monkeypatch.setattr(commit, "empty_image", broken)
    expect_failure("longer raw", DIFFERS + "|outside the file|past the end|cut off", move_table=move_table)


def test_the_table_s_place_before_it_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(storage: RamStorage, header: Header) -> None:
        await storage.write(0, [replace(header, l1_table_offset=header.header_bytes).encode()])
        await emptying.empty_image(storage, replace(header, l1_table_offset=header.header_bytes))

    monkeypatch.setattr(commit, "empty_image", broken)
    expect_failure("longer raw", DIFFERS + "|lies in|aligned|more than once", move_table=True)
