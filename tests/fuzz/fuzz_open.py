"""Coverage-guided fuzzing of everything that reads a QED image: open, check, map, read, write, repair.

How to run it: see `running.py`. An input is a recipe, not an image: a valid image with words changed, or one with this
header and these bytes in its tables; and what is to be done with it, since to do everything with each takes too long.
Only OSErrors with one plain line may come out, in a bounded number of steps, and what a repair has repaired must be
sound.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

with atheris.instrument_imports(include=["qedfuse"]):
    for module in ("check.check", "qed.image", "layers.mapping", "chain.opening"):
        importlib.import_module(f"qedfuse.{module}")

import trio

from qedfuse.qed.header import HEADER_BYTES, Header
from tests.fuzz.running import run
from tests.helpers.doubles.ram import RamFile
from tests.helpers.images.mutants import LIMITS, Change, Trial, Victim, make_victims, mutate

KINDS = ["limit", "cluster", "copy", "flip", "any"]
DEEDS = ["look", "look", "look", "use", "repair", "look use repair"]


class Target:
    def __init__(self) -> None:
        self.victims: list[Victim] = trio.run(make_victims)

    def __call__(self, data: bytes) -> None:
        recipe = atheris.FuzzedDataProvider(data)
        deeds = DEEDS[recipe.ConsumeIntInRange(0, len(DEEDS) - 1)]
        victim = self.victims[recipe.ConsumeIntInRange(0, len(self.victims) - 1)]
        make = self._patchwork if recipe.ConsumeIntInRange(0, 2) == 2 else self._mutant
        trio.run(survey, deeds, victim, make(recipe, victim))

    def _mutant(self, recipe: Any, victim: Victim) -> RamFile:
        """Few words changed, to something that means something."""
        dirty = recipe.ConsumeBool()
        size = None
        if recipe.ConsumeIntInRange(0, 3) == 0:
            size = (
                ("cut", recipe.ConsumeProbability()) if recipe.ConsumeBool() else ("grown", recipe.ConsumeUInt(8) >> 1)
            )
        how: list[Change] = []
        while recipe.remaining_bytes() > 4 and len(how) < 40:
            kind = KINDS[recipe.ConsumeIntInRange(0, len(KINDS) - 1)]
            place = recipe.ConsumeIntInRange(0, len(victim.places) - 1)
            if kind == "limit":
                value = LIMITS[recipe.ConsumeIntInRange(0, len(LIMITS) - 1)]
            elif kind == "cluster":
                value = recipe.ConsumeIntInRange(-2, 60)
            elif kind == "copy":
                value = recipe.ConsumeIntInRange(0, len(victim.places) - 1)
            elif kind == "flip":
                value = recipe.ConsumeIntInRange(0, 63)
            else:
                value = recipe.ConsumeUInt(8)
            how.append((place, (kind, value)))
        return mutate(victim, how, size, dirty)

    def _patchwork(self, recipe: Any, victim: Victim) -> RamFile:
        """Any header, and runs of any bytes anywhere."""
        file = victim.chain.file.fork()
        header = recipe.ConsumeBytes(HEADER_BYTES)
        file.write(0, header if recipe.ConsumeBool() else header[: recipe.ConsumeIntInRange(0, HEADER_BYTES)])
        while recipe.remaining_bytes() > 4:
            at = recipe.ConsumeIntInRange(0, file.size // 8) * 8
            file.write(at, recipe.ConsumeBytes(recipe.ConsumeIntInRange(1, 64)))
        return file


async def survey(deeds: str, victim: Victim, file: RamFile) -> None:
    trial = Trial(victim, file)
    if "look" in deeds:
        before = file.key()
        await trial.look()
        assert file.key() == before, "a reader has written"
    if "use" in deeds:
        await trial.use()
    if "repair" in deeds:
        await trial.repair()


def seeds() -> Iterator[tuple[str, bytes]]:
    """The provider takes numbers from an input's end: the deed is the last byte."""
    header = Header(4096, 2, 1, 0, 0, 0, 4096, 3 << 20).encode()
    for victim in range(8):
        for deed in range(2, len(DEEDS)):
            yield f"header-{victim}-{deed}", header + bytes([1, 2, victim, deed])
            for number in range(3):
                changes = bytes((37 * number + 11 * index + victim) % 256 for index in range(12 * (number + 1)))
                yield f"words-{victim}-{deed}-{number}", changes + bytes([3, number % 2, 0, victim, deed])


if __name__ == "__main__":
    run(Target(), dict(seeds()))
