"""What an image shows of the layer below becomes its own, and it reads the same, also while others write."""

from __future__ import annotations

import random
from functools import partial

import pytest
import trio

from qedfuse.errors import ReadOnlyError
from qedfuse.layers.raw import RawLayer
from qedfuse.layers.runs import Kind
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.image import Image
from tests.helpers.doubles.ram import Chaos, RamStorage
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.images.images import TINY, assert_sound, new_chain, open_chain, raw_file, read_header
from tests.helpers.judges.history import SECTOR, fill

CLUSTER = 4096
SIZE = 40 * CLUSTER + SECTOR
#: Data, zeroes in the middle, data up to inside of a cluster, and nothing.
BELOW = fill(0xBACC, 0, 8 * CLUSTER) + bytes(6 * CLUSTER) + fill(0xBACC, 0, 12 * CLUSTER + 3 * SECTOR)


async def image_over(below: bytes, geometry: Geometry = TINY, chaos: Chaos | None = None) -> Image:
    chain = await new_chain(SIZE, geometry, [(raw_file(below), "raw")] if below else [])
    image = await open_chain(chain, chaos=chaos)
    await image.write(2 * CLUSTER, b"m" * CLUSTER)
    await image.zero(4 * CLUSTER, CLUSTER)
    return image


async def kinds_of(image: Image) -> list[tuple[Kind, int]]:
    """Runs, in sectors."""
    found: list[tuple[Kind, int]] = []
    position = 0
    while position < image.size:
        for kind, length, _host in await image.map(position, image.size - position):
            position += length
            if found and found[-1][0] is kind:
                length += found.pop()[1] * SECTOR
            found.append((kind, length // SECTOR))
    return found


async def expect_own(image: Image) -> None:
    """It reads the same without the layer below, and over any other one."""
    before = bytes(await image.read(0, SIZE))
    await image.set_backing(RawLayer.open(RamStorage("stale", raw_file(b"s" * (SIZE + CLUSTER)))), "stale")
    assert await image.read(0, SIZE) == before
    await image.set_backing(None)
    assert await image.read(0, SIZE) == before
    file = image.storage.file  # type: ignore[attr-defined]
    await image.close()
    await assert_sound(file)


@pytest.mark.parametrize("geometry", [TINY, Geometry(2 * CLUSTER, 2), Geometry(64 * 1024, 2)], ids=str)
@pytest.mark.parametrize("below", [BELOW, BELOW + fill(1, 0, 99 * CLUSTER), b""], ids=["shorter", "longer", "none"])
def test_all_of_it(below: bytes, geometry: Geometry) -> None:
    async def main() -> None:
        image = await image_over(below, geometry)
        before = bytes(await image.read(0, SIZE))
        await image.copy_up(0, SIZE, zeroes=True)
        assert await image.read(0, SIZE) == before
        assert Kind.UNALLOCATED not in {kind for kind, _ in await kinds_of(image)}
        await image.copy_up(0, SIZE, zeroes=True)
        await expect_own(image)

    trio.run(main)


def test_what_is_mapped() -> None:
    """Data has clusters, zeroes have entries or none, as it is asked for; a range is widened to clusters."""

    async def main() -> None:
        image = await image_over(BELOW)
        per = CLUSTER // SECTOR
        await image.copy_up(3 * CLUSTER + SECTOR, 7 * CLUSTER, zeroes=False)
        data, zero, nothing = Kind.DATA, Kind.ZERO, Kind.UNALLOCATED
        expected = [(nothing, 2 * per), (data, 2 * per), (zero, per), (data, 3 * per), (nothing, 32 * per + 1)]
        assert await kinds_of(image) == expected
        await image.copy_up(9 * CLUSTER, 2 * CLUSTER, zeroes=True)
        assert (await image.map(8 * CLUSTER, 4 * CLUSTER))[1][:2] == (zero, 2 * CLUSTER)
        await image.close()

    trio.run(main)


def test_without_a_layer_below_nothing_waits_for_a_barrier() -> None:
    """Entries of zeroes in an image that stands alone: NEED_CHECK, as for any change of its tables."""

    async def main() -> None:
        chain = await new_chain(SIZE)
        image = await open_chain(chain)
        await image.copy_up(0, SIZE, zeroes=True)
        await image.flush()
        assert read_header(chain.file).needs_check
        assert await kinds_of(image) == [(Kind.ZERO, SIZE // SECTOR)]
        await image.close()
        assert not read_header(chain.file).needs_check

    trio.run(main)


@pytest.mark.parametrize("seed", range(8))
def test_others_write_meanwhile(seed: int) -> None:
    async def main() -> None:
        rnd = random.Random(seed)
        image = await image_over(BELOW, chaos=Chaos(seed))
        model = bytearray(await image.read(0, SIZE))

        async def write(part: range) -> None:
            for _ in range(10):
                offset = rnd.choice(part) * SECTOR
                data = rnd.randbytes(SECTOR * rnd.randint(1, 3))[: part.stop * SECTOR - offset]
                await image.write(offset, data)
                model[offset : offset + len(data)] = data

        third = SIZE // SECTOR // 3
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(write, range(number * third, (number + 1) * third))
            for start in range(0, SIZE, 8 * CLUSTER):
                nursery.start_soon(partial(image.copy_up, start, 8 * CLUSTER, zeroes=True))
        assert await image.read(0, SIZE) == model
        await expect_own(image)

    run_seeded(seed, main)


def test_behind_the_end() -> None:
    async def main() -> None:
        image = await image_over(BELOW)
        before = await kinds_of(image)
        await image.copy_up(SIZE, CLUSTER, zeroes=True)
        await image.copy_up(SIZE + 9 * CLUSTER, CLUSTER, zeroes=True)
        await image.copy_up(0, 0, zeroes=True)
        assert await kinds_of(image) == before
        await image.close()

    trio.run(main)


def test_a_read_only_image_refuses() -> None:
    async def main() -> None:
        chain = await new_chain(SIZE)
        image = Image(RamStorage("image", chain.file), read_header(chain.file), None, writable=False)
        with pytest.raises(ReadOnlyError):
            await image.copy_up(0, SIZE, zeroes=True)
        with pytest.raises(ReadOnlyError):
            image.keep_order()
        await image.close()

    trio.run(main)
