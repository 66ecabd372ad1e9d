"""An image without clusters, in place of one that has some; and another name of a backing file in a closed image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from qedfuse.qed.backing_name import set_backing_name
from qedfuse.qed.emptying import empty_image
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import Header
from tests.helpers.doubles.ram import RamFile, RamStorage
from tests.helpers.images.images import (
    TINY,
    Chain,
    assert_qemu_agrees,
    assert_sound,
    backing_name,
    contents,
    new_chain,
    on_device,
    open_chain,
    raw_file,
    read_header,
)
from tests.helpers.judges.history import fill

CLUSTER = 4096
#: More than one L2 table.
SIZE = 11 << 20


async def filled(geometry: Geometry) -> Chain:
    flat = fill(0xBACC, 0, 1 << 20)
    chain = await new_chain(SIZE, geometry, [(raw_file(flat), "raw")])
    image = await open_chain(chain)
    for offset in range(0, SIZE, 1 << 20):
        await image.write(offset, fill(0x0A, offset, 3 * CLUSTER))
    await image.close()
    return chain


def moved(file: RamFile, place: int) -> None:
    """Put the L1 table at another place, where nothing is, and something else where it was."""
    header = read_header(file)
    size = header.geometry.table_bytes
    file.write(place, file.read(header.l1_table_offset, size))
    file.write(header.l1_table_offset, fill(0xBAD, 0, size))
    file.write(0, replace(header, l1_table_offset=place).encode())


@pytest.mark.parametrize("geometry", [TINY, Geometry(CLUSTER, 16), Geometry(1 << 20, 2)], ids=str)
@pytest.mark.parametrize("place", ["first", "last", "overlapping"])
def test_empty(geometry: Geometry, place: str, tmp_path: Path) -> None:
    async def main() -> None:
        chain = await filled(geometry)
        old = read_header(chain.file)
        if place == "last":
            moved(chain.file, -(-chain.file.size // geometry.cluster_size) * geometry.cluster_size)
        elif place == "overlapping":  # the table's new place and its old one share clusters
            chain = await new_chain(SIZE, geometry, chain.below)
            chain.file.truncate(chain.file.size + geometry.cluster_size)
            moved(chain.file, old.l1_table_offset + geometry.cluster_size)
        new = await empty_image(RamStorage("image", chain.file), read_header(chain.file))
        assert new == read_header(chain.file) == old
        assert chain.file.size == old.header_bytes + geometry.table_bytes
        assert backing_name(chain.file) == "below0"
        await assert_sound(chain.file)
        flat = chain.below[0][0].read(0, 1 << 20).ljust(SIZE, b"\0")
        assert await contents(chain) == flat
        assert_qemu_agrees(chain, flat, tmp_path, leaks=False)
        image = await open_chain(chain)
        await image.write(5 * CLUSTER, b"again")
        await image.close()
        await assert_sound(chain.file)

    trio.run(main)


def test_on_a_device() -> None:
    """It stays as large, and the table stays where it is; what is free there is found anew."""

    async def main() -> None:
        chain = await filled(TINY)
        moved(chain.file, -(-chain.file.size // CLUSTER) * CLUSTER)
        header: Header = read_header(chain.file)
        chain = Chain(on_device(chain.file, 2 << 20), chain.below)
        assert await empty_image(RamStorage("image", chain.file), header) == header
        assert chain.file.size == 2 << 20
        flat = bytearray(chain.below[0][0].read(0, 1 << 20).ljust(SIZE, b"\0"))
        assert await contents(chain) == flat
        image = await open_chain(chain)
        for offset in range(0, SIZE, 1 << 20):  # all the room there is
            flat[offset : offset + CLUSTER] = fill(0x0B, offset, CLUSTER)
            await image.write(offset, flat[offset : offset + CLUSTER])
        await image.close()
        await assert_sound(chain.file)
        assert await contents(chain) == flat

    trio.run(main)


@pytest.mark.parametrize(("name", "is_raw"), [(b"other", True), (b"other", False), (b"", False)])
def test_another_name(name: bytes, is_raw: bool) -> None:
    """And nothing else changes, neither in the file nor in its length."""

    async def main() -> None:
        chain = await filled(TINY)
        old = read_header(chain.file)
        before = chain.file.read(0, chain.file.size)
        await set_backing_name(RamStorage("image", chain.file), old, name, is_raw=is_raw)
        new = read_header(chain.file)
        assert backing_name(chain.file) == name.decode()
        assert new.backing_is_raw is is_raw
        assert new == old.with_backing_file(new.backing_filename_offset, len(name), is_raw=is_raw)
        assert chain.file.size == len(before)
        assert chain.file.read(CLUSTER, chain.file.size) == before[CLUSTER:]

    trio.run(main)
