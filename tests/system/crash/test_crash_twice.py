"""A process is killed, the next one opens the image, and then the power fails.

What the first has written is in the host's page cache, where the next one reads it and may build on it. Nothing says
that it is on the disk: the next one's first flush has to vouch for it, though it has written nothing itself.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from qedfuse.qed.image import Image
from tests.helpers.doubles.crash import SEED
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.images.images import TINY, new_chain, open_chain
from tests.helpers.images.scenarios import BELOW, CLUSTER, SIZE
from tests.helpers.judges.history import SECTOR, Guest
from tests.helpers.judges.survival import Run, raw_below

Life = Callable[[Guest], Awaitable[None]]


async def in_place(guest: Guest) -> None:
    """Killed when the header says that the image is clean."""
    await guest.write(0, 2 * CLUSTER)
    await guest.clean()
    await guest.write(SECTOR, SECTOR)
    await guest.discard(CLUSTER, CLUSTER)


async def new_clusters(guest: Guest) -> None:
    """Killed when their entries have been written, too."""
    await guest.write(0, SECTOR)
    await guest.clean()
    await guest.write(2 * CLUSTER, CLUSTER + SECTOR)
    await guest.write(9 * CLUSTER, SECTOR)
    await guest.write_back()


async def flush(guest: Guest) -> None:
    await guest.flush()


async def close(guest: Guest) -> None:
    await guest.close()


async def flush_by_a_reader(guest: Guest) -> None:
    """As sync(1) does. The new entries are not for it to judge: it repairs nothing."""
    image = guest.image
    reader = Image(image.storage, image.header, image.backing, writable=False)
    await Guest(reader, guest.history, CLUSTER).flush()


@pytest.mark.parametrize("backing", ["alone", "shorter"])
@pytest.mark.parametrize("then", [flush, close, flush_by_a_reader])
@pytest.mark.parametrize("first", [in_place, new_clusters])
def test_the_first_flush_vouches_for_what_was_there(first: Life, then: Life, backing: str, tmp_path: Path) -> None:
    async def main() -> None:
        below, flat = raw_below(BELOW[backing]) if BELOW[backing] else ([], b"")
        chain = await new_chain(SIZE, TINY, below)
        run = await Run.of(first, size=SIZE, flat=flat, start=chain)
        image = await open_chain(chain, run.storage)
        await then(Guest(image, run.history, CLUSTER))
        run.watch()
        await run.enumerate(random.Random(SEED), complete=512, samples=400, directory=tmp_path)
        assert run.tried > 10

    run_seeded(SEED, main)
