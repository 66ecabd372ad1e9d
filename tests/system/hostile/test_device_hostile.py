"""Images with some words changed, on a block device: only OSErrors come out, and a repair is a good one."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import trio

from tests.helpers.images.images import on_device
from tests.helpers.images.mutants import LIMITS, Change, Trial, make_victims, mutate

#: Of each part; for more, in the environment.
MUTANTS = int(os.environ.get("QEDFUSE_DEVICE_MUTANTS", "150"))


def some_changes(rnd: random.Random) -> list[Change]:
    values: list[Callable[[], tuple[str, int]]] = [
        lambda: ("limit", rnd.choice(LIMITS)),
        lambda: ("cluster", rnd.randint(-2, 60)),
        lambda: ("copy", rnd.randint(0, 10_000)),
        lambda: ("flip", rnd.randint(0, 63)),
        lambda: ("any", rnd.getrandbits(64)),
    ]
    return [(rnd.randint(0, 10_000), rnd.choice(values)()) for _ in range(rnd.randint(0, 6))]


@pytest.mark.parametrize("part", range(4))
def test_mutants(part: int) -> None:
    async def main() -> None:
        victims = await make_victims()
        repaired = 0
        for seed in range(part * MUTANTS, (part + 1) * MUTANTS):
            rnd = random.Random(seed)
            victim = rnd.choice(victims)
            file = mutate(victim, some_changes(rnd), None, rnd.random() < 0.3)
            size = file.size + rnd.choice([0, 512, 4096, 100 << 10, 3 << 20])
            try:
                for what in ("look", "use", "repair"):
                    trial = Trial(victim, on_device(file, size, stale=rnd.choice([b"", b"\xff", rnd.randbytes(64)])))
                    with trio.fail_after(60):
                        repaired += await getattr(trial, what)() or 0
                    assert trial.file.size == size
            except BaseException as error:
                error.add_note(f"seed {seed}, size {size}")
                raise
        assert repaired > MUTANTS // 4

    trio.run(main)
