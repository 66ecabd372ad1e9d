"""Every crash of the real daemon with an image on a block device, as in test_crash_syscalls.py: what strace has seen of
its system calls, and of those alone, was done to the device."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.helpers.doubles.crash import SEED
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.judges.history import SECTOR
from tests.helpers.judges.traced_run import run_of
from tests.helpers.mounts.modes import NATIVE, NEEDS_NATIVE, PYTHON, Mode
from tests.helpers.mounts.mounted_guest import CLUSTER
from tests.helpers.mounts.traced import trace

pytestmark = pytest.mark.guest

DEVICE = 128 * CLUSTER + SECTOR


@pytest.mark.parametrize(
    ("mode", "scenario", "below"),
    [
        pytest.param(NATIVE, "allocate", 0, marks=NEEDS_NATIVE),
        pytest.param(NATIVE, "allocate", 30 * CLUSTER + SECTOR, marks=NEEDS_NATIVE),
        pytest.param(NATIVE, "holes", 0, marks=NEEDS_NATIVE),
        pytest.param(NATIVE, "walk", 30 * CLUSTER + SECTOR, marks=NEEDS_NATIVE),
        pytest.param(PYTHON, "walk", 0),
        pytest.param(PYTHON, "resize", 30 * CLUSTER + SECTOR),
    ],
)
def test_crash(tmp_path: Path, mode: Mode, scenario: str, below: int) -> None:
    found = trace(tmp_path, scenario, mode, "-o", "direct_io", below=below, seed=SEED, device=DEVICE)
    run = run_of(found)

    async def main() -> None:
        await run.enumerate(random.Random(SEED), complete=64, samples=1000)

    run_seeded(SEED, main)
    assert run.tried > 20
    assert not any(event.call.kind == "truncate" and event.call.path == found.image for event in found.events)
    if mode == NATIVE:
        assert found.native, "the fast path left the work to Python"
