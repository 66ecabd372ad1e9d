"""Every crash while an image is rebased: it reads the same in all states, over the file that its header names then, and
a second rebase finishes the work.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qedfuse.layers.layer import Layer
from qedfuse.qed import commit
from qedfuse.qed import file_growth as growing
from qedfuse.qed.commit import Committer
from qedfuse.qed.image import Image
from qedfuse.tools import rebase
from tests.helpers.doubles.crash import SEED, STATES
from tests.helpers.doubles.ram import RamFile
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.images.images import Chain, backing_name, new_chain, open_chain, raw_file, read_header
from tests.helpers.judges.history import SECTOR, Guest, fill
from tests.helpers.judges.survival import BAD, Run

CLUSTER = 4096
SIZE = 24 * CLUSTER + 3 * SECTOR
NEW = "new"

Below = list[tuple[RamFile, str]]


@pytest.fixture(autouse=True, params=[0, 256], ids=["each copy is committed", "all at once"])
def often(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The file grows by what is needed, and often."""
    monkeypatch.setattr(growing, "_GROW_CLUSTERS", 0)
    monkeypatch.setattr(commit, "MAX_DIRTY_PAGES", request.param)
    monkeypatch.setattr(rebase, "_STEP", CLUSTER)


def raw(tag: int, size: int, *, zero: range = range(0)) -> Below:
    """A raw file; of its clusters those of `zero` are zeroes."""
    content = bytearray(fill(tag, 0, size))
    for cluster in zero:
        content[cluster * CLUSTER : (cluster + 1) * CLUSTER] = bytes(CLUSTER)
    return [(raw_file(bytes(content[:size])), "raw")]


async def qed_over(below: Below) -> Below:
    """A QED image over `below`, with something of its own, zeroes and a shorter size than what is below it."""
    chain = await new_chain(9 * CLUSTER, below=below)
    image = await open_chain(chain)
    await image.write(CLUSTER, fill(0x0A, CLUSTER, CLUSTER))
    await image.zero(4 * CLUSTER, CLUSTER)
    await image.close()
    return [*below, (chain.file, "qed")]


#: Old and new: what is below the image, by name. None of them alike, but for parts.
PAIRS = {
    "shorter": (raw(0x01D, 20 * CLUSTER, zero=range(3, 6)), raw(0x01D, 7 * CLUSTER)),
    "longer": (raw(0x01D, 9 * CLUSTER + SECTOR, zero=range(3, 6)), raw(0x3EE, 40 * CLUSTER)),
    "none": (raw(0x01D, 20 * CLUSTER, zero=range(3, 6)), []),
    "first": ([], raw(0x3EE, 20 * CLUSTER, zero=range(3, 6))),
}


async def start_over(below: Below) -> tuple[Chain, bytes]:
    """An image with data and zeroes of its own, closed in good order; and what it reads as."""
    chain = await new_chain(SIZE, below=below)
    image = await open_chain(chain)
    await image.write(2 * CLUSTER + SECTOR, fill(0x0B, 0, SECTOR))
    await image.write(11 * CLUSTER, fill(0x0B, 0, 2 * CLUSTER))
    await image.zero(13 * CLUSTER, CLUSTER)
    await image.flush()
    flat = bytes(await image.read(0, SIZE))
    await image.close()
    return chain, flat


async def rebased(old: Below, new: Below) -> Run:
    chain, flat = await start_over(old)
    name = NEW if new else ""
    chain.others = {name: new}

    async def scenario(guest: Guest) -> None:
        layer = Chain(RamFile(), new).layer_below()
        await rebase.put_below(guest.image, layer, name, None)
        await guest.close()

    return await Run.of(scenario, size=SIZE, flat=flat, start=chain)


async def enumerate_all(run: Run, directory: Path | None, samples: int) -> None:
    await run.enumerate(random.Random(SEED), complete=256, samples=samples, directory=directory, ask_qemu=4)


async def pairs_of(case: str) -> tuple[Below, Below]:
    if case == "qed":
        old, new = PAIRS["longer"]
        return await qed_over(old), await qed_over(new)
    if case == "down":
        old = raw(0x01D, 20 * CLUSTER)
        return await qed_over(old), old
    return PAIRS[case]


CASES = [*PAIRS, "qed", "down"]


@pytest.mark.parametrize("case", CASES)
def test_crash(case: str, tmp_path: Path) -> None:
    async def main() -> None:
        old, new = await pairs_of(case)
        run = await rebased(old, new)
        await enumerate_all(run, tmp_path, min(STATES, 50_000) // 20)
        names = {backing_name(point.base) for point in run.storage.crash_points()}
        assert len(names) == 2  # each was in the file, durably
        print(f"figures: {run.tried} states at {run.complete_points + run.sampled_points} points")
        assert run.tried > 5 and run.complete_points > 5

    run_seeded(SEED, main)


@pytest.mark.parametrize("case", CASES)
def test_again_after_a_crash(case: str) -> None:
    """From any state on it is finished, and reads the same over the new one."""

    async def main() -> None:
        old, new = await pairs_of(case)
        run = await rebased(old, new)
        rng = random.Random(SEED)
        for point in run.storage.crash_points():
            state = point.some_state(rng)
            image = await open_chain(run.chain.under(state), None)
            layer = Chain(RamFile(), new).layer_below()
            await rebase.put_below(image, layer, NEW if new else "", None)
            await image.close()
            assert backing_name(state) == (NEW if new else "")
            assert not read_header(state).needs_check
            fresh = await open_chain(run.chain.under(state))
            assert await fresh.read(0, SIZE) == run.history.initial

    run_seeded(SEED, main)


# -- it bites ---------------------------------------------------------------------------------------------------------


def expect_failure(case: str) -> None:
    async def main() -> None:
        old, new = await pairs_of(case)
        await enumerate_all(await rebased(old, new), None, 1000)

    with pytest.raises(AssertionError, match=BAD):
        run_seeded(SEED, main)


@pytest.mark.parametrize("case", CASES)
def test_the_name_before_the_copies_are_durable(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    original = Committer.replace_backing
    commit_all = Committer._commit

    async def broken(self: Committer, *arguments: object, **keywords: object) -> None:
        async def none(self: Committer, durable: bool) -> None:
            pass

        with monkeypatch.context() as patch:
            patch.setattr(Committer, "_commit", none)
            await original(self, *arguments, **keywords)  # type: ignore[arg-type]
        await commit_all(self, True)

    monkeypatch.setattr(Committer, "replace_backing", broken)
    expect_failure(case)


@pytest.mark.parametrize("case", ["longer", "first", "qed", "down"])
def test_zeroes_without_an_entry(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    original = Image.copy_up

    async def broken(self: Image, offset: int, size: int, *, zeroes: bool) -> None:
        await original(self, offset, size, zeroes=False)

    monkeypatch.setattr(Image, "copy_up", broken)
    expect_failure(case)


def test_only_what_is_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a backing file's end were the image's."""
    original = rebase._copy_step

    async def broken(image: Image, layer: Layer | None, start: int, end: int) -> None:
        below = image.backing
        assert layer is not None and below is not None
        end = min(end, layer.size, below.size)
        if start < end:
            await original(image, layer, start, end)

    monkeypatch.setattr(rebase, "_copy_step", broken)
    expect_failure("shorter")
    expect_failure("longer")
