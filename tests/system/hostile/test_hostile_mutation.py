"""Valid images with some bytes changed: whatever the engine and the check make of them, only OSErrors come out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from qedfuse.chain.opening import open_image
from qedfuse.chain.policy import BackingPolicy
from qedfuse.qed.header import HEADER_BYTES, Header
from tests.helpers.doubles.ram import RamFile
from tests.helpers.images.images import dump
from tests.helpers.images.mutants import (
    GEOMETRIES,
    LIMITS,
    MAX_SECONDS,
    Change,
    Trial,
    Victim,
    first_entries,
    make_victims,
    mutate,
)
from tests.helpers.qemu.cli import tool

#: Every so many repaired images the real qemu-img is asked.
SAMPLE = 15


@pytest.fixture(scope="module")
def victims() -> list[Victim]:
    return trio.run(make_victims)


changes = st.lists(
    st.tuples(
        st.integers(0, 10_000),  # which place, as far as there are any
        st.one_of(
            st.tuples(st.just("limit"), st.sampled_from(LIMITS)),
            st.tuples(st.just("cluster"), st.integers(-2, 60)),  # of the file; negative: from its end
            st.tuples(st.just("copy"), st.integers(0, 10_000)),  # what stands in another place
            st.tuples(st.just("flip"), st.integers(0, 63)),  # one bit
            st.tuples(st.just("any"), st.integers(0, (1 << 64) - 1)),
        ),
    ),
    min_size=0,
    max_size=6,
)
sizes = st.one_of(
    st.just(None),
    st.just(None),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("grown"), st.sampled_from([1, 511, 4096, 100_000, 1 << 40, (1 << 63) - 1])),
)


class Recipe(NamedTuple):
    """How a mutant is made: of which victim, with which words changed, and the file cut or grown."""

    which: int
    how: list[Change]
    size: tuple[str, float] | None
    dirty: bool

    def make(self, victims: list[Victim]) -> tuple[Victim, RamFile]:
        victim = victims[self.which]
        return victim, mutate(victim, self.how, self.size, self.dirty)


def recipes(sizes: st.SearchStrategy[Any]) -> st.SearchStrategy[Recipe]:
    return st.builds(Recipe, st.integers(0, 2 * len(GEOMETRIES) - 1), changes, sizes, st.booleans())


class Sampler:
    """Asks the real qemu-img about one repaired image in `SAMPLE`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.repaired = 0
        self.asked = 0

    def __call__(self, victim: Victim, file: RamFile) -> None:
        self.repaired += 1
        header = Header.decode(file.read(0, HEADER_BYTES), "")
        if self.repaired % SAMPLE or header.table_size == 1 or file.size > 1 << 30:
            return
        self.asked += 1
        if header.has_backing_file:  # qemu-img opens it, whatever the name has become; its check does not need it
            file = file.fork()
            file.write(16, bytes(8))
        image = dump(file, self.directory / "mutant.qed")
        tool("qemu-img", "check", "-f", "qed", image, status=(0, 3))


@pytest.fixture(scope="module")
def sampler() -> Iterator[Sampler]:
    directory = Path(tempfile.mkdtemp(prefix="qedfuse-mutants-"))
    sampler = Sampler(directory)
    try:
        yield sampler
    finally:
        shutil.rmtree(directory)
    print(f"figures: {sampler.repaired} mutants repaired, qemu-img agreed on {sampler.asked}")


def try_mutant(victims: list[Victim], sampler: Sampler, recipe: Recipe) -> None:
    victim, mutant = recipe.make(victims)

    async def run() -> None:
        with trio.fail_after(MAX_SECONDS):
            trial = Trial(victim, mutant.fork())
            await trial.look()
            assert trial.file.key() == mutant.key(), "a reader has written"
            await trial.use()
            for file in (mutant.fork(), trial.file):  # as it was, and after all that was done to it
                patient = Trial(victim, file)
                if await patient.repair():
                    sampler(victim, file)
                trial.errors += patient.errors
            event("errors" if trial.errors else "no errors")

    trio.run(run)


unhurried = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(unhurried, max_examples=400)
@given(recipe=recipes(sizes))
def test_mutants(victims: list[Victim], sampler: Sampler, recipe: Recipe) -> None:
    try_mutant(victims, sampler, recipe)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(unhurried, max_examples=20_000)
@given(recipe=recipes(sizes))
def test_many_mutants(victims: list[Victim], sampler: Sampler, recipe: Recipe) -> None:
    try_mutant(victims, sampler, recipe)


# The same with real files, through `open_image`: names of backing files change, too.


@pytest.fixture(scope="module")
def scratch(victims: list[Victim]) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="qedfuse-mutants-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@settings(unhurried, max_examples=100)
@given(recipe=recipes(st.none()), name=st.one_of(st.none(), st.binary(min_size=5, max_size=9)), read_only=st.booleans())
def test_opened(victims: list[Victim], scratch: Path, recipe: Recipe, name: bytes | None, read_only: bool) -> None:
    victim, file = recipe.make(victims)
    if name is not None:
        file.write(HEADER_BYTES, name)
    path = dump(file, victim.chain.dump(scratch, "mutant.qed"))
    below = [(scratch / f"below{number}", lower) for number, (lower, _) in enumerate(victim.chain.below)]

    async def run() -> None:
        trial = Trial(victim, file)

        async def use() -> None:
            policy = BackingPolicy(root=str(scratch))
            async with open_image(path, read_only=read_only, policy=policy) as image:
                await trial.attempt(lambda: image.read(0, 20_000))
                await trial.attempt(lambda: first_entries(image))
                if not read_only:
                    await trial.change(image)

        with trio.fail_after(MAX_SECONDS):
            await trial.attempt(use)

    trio.run(run)
    for lower_path, lower in below:
        assert lower_path.read_bytes() == lower.read(0, lower.size), "a backing file was written"
