"""What every `Disk` promises: the engine's image, alone and over a backing file, and the one that programs get."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio

from qedfuse import library
from qedfuse.layers.disk import Disk
from qedfuse.layers.runs import Kind
from qedfuse.qed.image import Image
from qedfuse.sizes import SECTOR_SIZE, round_up
from tests.helpers.doubles.ram import Chaos, RamStorage
from tests.helpers.images.images import POOL, TINY, Chain, assert_sound, new_chain, open_chain, raw_file, read_header
from tests.helpers.judges.expect import raises_errno

SIZE = 40 * 4096 + 512
CLUSTER = TINY.cluster_size

#: The library's image does not tell its version.
ENGINE = ["image", "image, chaotic", "image over a file"]
KINDS = [*ENGINE, "library"]


class Host(RamStorage):
    """`fails`: with this errno every sync does."""

    fails = 0

    async def sync(self) -> None:
        if self.fails:
            raise OSError(self.fails, os.strerror(self.fails))
        await super().sync()


@asynccontextmanager
async def opened(
    kind: str, *, writable: bool = True, fixed_size: bool = False
) -> AsyncIterator[tuple[Disk, bytearray, Host]]:
    """A disk, what it reads as, and the file below."""
    below = random.Random(1).randbytes(SIZE // 2) if kind == "image over a file" else b""
    chain = await new_chain(SIZE, below=[(raw_file(below), "raw")] if below else [])
    host = Host("ram", chain.file, writable=writable, chaos=Chaos(7) if "chaotic" in kind else None)
    if writable:
        image = await open_chain(chain, host, fixed_size=fixed_size)
    else:
        image = Image(host, read_header(chain.file), chain.layer_below(), writable=False, pool=POOL)
    try:
        disk = cast("Disk", library.Image(image)) if kind == "library" else image
        yield disk, bytearray(below.ljust(SIZE, b"\0")), host
        if image.failed:
            with raises_errno(errno.EIO):
                await image.close()
            return
        await image.close()
    finally:
        with trio.CancelScope(shield=True):
            await host.close()
    await assert_sound(chain.file)
    await expect_the_same_below(chain, below)


async def expect_the_same_below(chain: Chain, below: bytes) -> None:
    for file, _format in chain.below:
        assert file.read(0, file.size) == below, "a backing file is never written"


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_says_of_itself(kind: str) -> None:
    async def main() -> None:
        async with opened(kind) as (disk, _model, _host):
            assert (disk.path, disk.size, disk.writable, disk.failed) == ("ram", SIZE, True, None)
        async with opened(kind, writable=False) as (disk, _model, _host):
            assert not disk.writable

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_end_where_the_disk_ends(kind: str) -> None:
    async def main() -> None:
        async with opened(kind) as (disk, model, _host):
            for offset, size in ((0, SIZE), (0, SIZE + 1), (SIZE - 1, 5), (SIZE, 5), (SIZE + 4096, 5), (3, 0)):
                assert await disk.read(offset, size) == model[offset : offset + size]

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_against_a_model(kind: str) -> None:
    """Any offset and size: what is written, zeroed, discarded, cut off and added reads as it should, at once."""

    async def change(disk: Disk, model: bytearray, rnd: random.Random) -> None:
        size = rnd.choice([0, 1, 511, 512, CLUSTER, 3 * CLUSTER + 17])
        offset = rnd.randrange(len(model) + CLUSTER)
        match rnd.choice(["write", "write", "zero", "discard", "flush", "resize"]):
            case "write":
                data = rnd.randbytes(size)
                await disk.write(offset, data)
                if data:
                    model.extend(bytes(max(0, round_up(offset + size, SECTOR_SIZE) - len(model))))
                    model[offset : offset + size] = data
            case "zero":
                await disk.zero(offset, size)
                end = min(offset + size, len(model))
                model[offset:end] = bytes(max(0, end - offset))
            case "discard":
                await disk.discard(offset, size)
                start, end = round_up(offset, CLUSTER), offset + size
                end = len(model) if end >= len(model) else end // CLUSTER * CLUSTER
                model[start:end] = bytes(max(0, end - start))
            case "flush":
                await disk.flush()
            case "resize":
                wanted = rnd.choice([len(model), len(model) + 5000, max(1, len(model) - 9000)])
                await disk.resize(wanted)
                end = round_up(wanted, SECTOR_SIZE)
                del model[wanted:]
                model.extend(bytes(end - len(model)))

    async def main() -> None:
        rnd = random.Random(5)
        async with opened(kind) as (disk, model, _host):
            for _ in range(200):
                await change(disk, model, rnd)
                assert disk.size == len(model)
                assert await disk.read(0, len(model)) == model

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_discard_leaves_the_edges(kind: str) -> None:
    async def main() -> None:
        async with opened(kind) as (disk, model, _host):
            await disk.write(0, b"x" * 4 * CLUSTER)
            await disk.discard(CLUSTER - 1, 2 * CLUSTER)
            model[: 4 * CLUSTER] = b"x" * CLUSTER + bytes(CLUSTER) + b"x" * 2 * CLUSTER
            assert await disk.read(0, SIZE) == model

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_begins_where_it_is_asked_to(kind: str) -> None:
    """It covers something, no more than was asked for, and what it calls zeroes or data reads so."""

    async def main() -> None:
        async with opened(kind) as (disk, model, _host):
            await disk.write(5000, b"x" * 9000)
            await disk.zero(30 * CLUSTER, 2 * CLUSTER)
            model[5000:14000] = b"x" * 9000
            model[30 * CLUSTER : 32 * CLUSTER] = bytes(2 * CLUSTER)
            for offset in (0, 1, 5000, 4095, 30 * CLUSTER, SIZE - 1):
                size = SIZE - offset
                runs = await disk.map(offset, size)
                assert 0 < sum(run.length for run in runs) <= size and all(run.length for run in runs)
                for what, length, _place in runs:
                    if what is Kind.ZERO:
                        assert not any(model[offset : offset + length])
                    if what is Kind.UNALLOCATED:
                        assert b"x" * 512 not in model[offset : offset + length]
                    offset += length
            [run] = await disk.map(5000, 100)
            assert (run.kind, run.length) == (Kind.DATA, 100)

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_only_stays_as_it_is(kind: str) -> None:
    async def main() -> None:
        async with opened(kind, writable=False) as (disk, model, _host):
            changes: list[Callable[[], Awaitable[None]]] = [
                lambda: disk.write(0, b"x"),
                lambda: disk.zero(0, CLUSTER),
                lambda: disk.discard(0, CLUSTER),
                lambda: disk.resize(SIZE),
            ]
            for change in changes:
                with raises_errno(errno.EROFS):
                    await change()
            await disk.flush()
            assert await disk.read(0, SIZE) == model

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_has_limits(kind: str) -> None:
    async def main() -> None:
        most = TINY.max_image_size
        async with opened(kind) as (disk, model, _host):
            with raises_errno(errno.EFBIG):
                await disk.resize(most + 1)
            with raises_errno(errno.EFBIG):
                await disk.write(most, b"x")
            assert disk.size == SIZE
        async with opened(kind, fixed_size=True) as (disk, model, _host):
            with raises_errno(errno.EPERM):
                await disk.resize(SIZE + 512)
            with raises_errno(errno.ENOSPC):
                await disk.write(SIZE - 1, b"xy")
            assert disk.size == SIZE
            assert await disk.read(0, SIZE) == model

    trio.run(main)


@pytest.mark.parametrize("kind", ENGINE)
def test_the_version_tells_what_may_have_changed(kind: str) -> None:
    async def main() -> None:
        async with opened(kind) as (disk, _model, _host):
            changes: list[Callable[[], Awaitable[None]]] = [
                lambda: disk.write(0, b"x" * CLUSTER),
                lambda: disk.write(0, b"y" * CLUSTER),  # in place: it may fill a hole
                lambda: disk.zero(0, CLUSTER),
                lambda: disk.write(8 * CLUSTER, b"x" * CLUSTER),
                lambda: disk.discard(8 * CLUSTER, CLUSTER),
                lambda: disk.resize(SIZE + 512),
                lambda: disk.resize(512),
            ]
            for change in changes:
                version = disk.version
                await disk.read(0, 4096)
                assert disk.version == version
                await change()
                assert disk.version != version

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_sync_is_final(kind: str) -> None:
    async def main() -> None:
        async with opened(kind) as (disk, _model, host):
            await disk.write(0, b"x" * CLUSTER)
            await disk.flush()
            await disk.write(CLUSTER, b"x" * CLUSTER)
            host.fails = errno.ENOSPC
            with raises_errno(errno.ENOSPC, errno.EIO):
                await disk.flush()
            host.fails = 0
            assert disk.failed is not None and disk.failed.errno == errno.ENOSPC
            changes: list[Callable[[], Awaitable[None]]] = [
                lambda: disk.write(0, b"x"),
                lambda: disk.zero(0, 1),
                disk.flush,
            ]
            for change in changes:
                with raises_errno(errno.EIO):
                    await change()
            assert await disk.read(0, CLUSTER) == b"x" * CLUSTER, "reading goes on"

    trio.run(main)
