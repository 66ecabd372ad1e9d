"""What every `Disk` refuses, and what comes of a host that fails and of a call that is cancelled."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio

from qedfuse.sizes import SECTOR_SIZE
from tests.helpers.images.disks import CLUSTER, KINDS, SIZE, opened
from tests.helpers.images.images import TINY, contents
from tests.helpers.judges.expect import raises_errno


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_only_stays_as_it_is(kind: str) -> None:
    async def main() -> None:
        async with opened(kind, writable=False) as it:
            disk = it.disk
            changes: list[Callable[[], Awaitable[None]]] = [
                lambda: disk.write(0, b"x"),
                lambda: disk.zero(0, CLUSTER),
                lambda: disk.discard(0, CLUSTER),
                lambda: disk.resize(SIZE),
                lambda: disk.resize(512),
            ]
            for change in changes:
                with raises_errno(errno.EROFS):
                    await change()
            await disk.flush()
            await it.expect_model()
            assert [change.kind for change in it.host.log] == ["synced"]  # what others may have written

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_has_limits(kind: str) -> None:
    async def main() -> None:
        most = TINY.max_image_size
        async with opened(kind) as it:
            before = it.host.file.key()
            with raises_errno(errno.EFBIG):
                await it.disk.resize(most + 1)
            for at in (most, most + CLUSTER - 1, 1 << 62):
                with raises_errno(errno.EFBIG):
                    await it.disk.write(at, b"xy")
            assert it.host.file.key() == before
            await it.expect_model()
            await it.disk.resize(most)
            assert it.disk.size == most
            assert await it.disk.read(most - CLUSTER, 2 * CLUSTER) == bytes(CLUSTER)
            await it.disk.resize(SIZE)
            await it.expect_model()

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_size_stays(kind: str) -> None:
    async def main() -> None:
        async with opened(kind, fixed_size=True) as it:
            for size in (SIZE + 512, SIZE - 512, 512):
                with raises_errno(errno.EPERM):
                    await it.disk.resize(size)
            for at in (SIZE - 1, SIZE, SIZE + CLUSTER):
                with raises_errno(errno.ENOSPC):
                    await it.disk.write(at, b"xy")
            await it.disk.resize(SIZE)
            await it.expect_model()
            await it.disk.write(SIZE - 2, b"xy")
            await it.disk.zero(SIZE - CLUSTER, 2 * CLUSTER)
            await it.disk.discard(0, 2 * SIZE)
            it.model[:] = bytes(SIZE)
            await it.expect_model()

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_sync_is_final(kind: str) -> None:
    """Nothing is written from then on; what was durable before it stays."""

    async def main() -> None:
        async with opened(kind) as it:
            disk, host = it.disk, it.host
            await disk.write(0, b"x" * CLUSTER)
            await disk.flush()
            it.model[:CLUSTER] = b"x" * CLUSTER
            await it.expect_durable()
            await disk.write(CLUSTER, b"y" * CLUSTER)
            host.fails = errno.ENOSPC
            with raises_errno(errno.ENOSPC, errno.EIO):
                await disk.flush()
            host.fails = 0
            assert disk.failed is not None and disk.failed.errno == errno.ENOSPC
            before = host.file.key()
            changes: list[Callable[[], Awaitable[None]]] = [
                lambda: disk.write(0, b"x"),
                lambda: disk.write(CLUSTER, b"x" * CLUSTER),
                lambda: disk.write(9 * CLUSTER, b"x"),
                lambda: disk.zero(0, 1),
                lambda: disk.discard(0, SIZE),
                lambda: disk.resize(SIZE + 512),
                lambda: disk.resize(512),
                disk.flush,
            ]
            for change in changes:
                with raises_errno(errno.EIO):
                    await change()
            assert disk.size == SIZE
            assert await disk.read(0, 2 * CLUSTER) == b"x" * CLUSTER + b"y" * CLUSTER, "reading goes on"
        assert host.file.key() == before
        assert (await contents(it.chain, it.durable()))[:CLUSTER] == b"x" * CLUSTER

    trio.run(main)


@pytest.mark.parametrize("at", [0, 9 * CLUSTER, 2 * CLUSTER - 100])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_write_is_told_and_can_be_made_again(kind: str, at: int) -> None:
    """In place, into a new cluster, and into both."""

    async def main() -> None:
        async with opened(kind) as it:
            await it.disk.write(0, b"x" * 2 * CLUSTER)
            await it.disk.flush()
            it.model[: 2 * CLUSTER] = b"x" * 2 * CLUSTER
            it.host.full = errno.ENOSPC
            with raises_errno(errno.ENOSPC):
                await it.disk.write(at, b"y" * CLUSTER)
            assert it.disk.failed is None
            await it.expect_model()
            it.host.full = 0
            await it.disk.flush()
            await it.expect_durable()
            await it.disk.write(at, b"y" * CLUSTER)
            it.model[at : at + CLUSTER] = b"y" * CLUSTER
            await it.expect_model()
            await it.disk.flush()
            await it.expect_durable()

    trio.run(main)


@pytest.mark.parametrize("way", ["write", "zero", "discard", "resize", "flush"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_that_is_cancelled_has_happened_in_part(kind: str, way: str) -> None:
    """Wherever it is cancelled: each sector is the old one or the new one, and the disk goes on."""
    at, size = CLUSTER + 512, 5 * CLUSTER

    async def main(checkpoints: int) -> None:
        rnd = random.Random(checkpoints)
        old, new = rnd.randbytes(SIZE), rnd.randbytes(size)
        async with opened(kind, leaks=True) as it:
            disk = it.disk
            await disk.write(0, old)
            calls: dict[str, Callable[[], Awaitable[None]]] = {
                "write": partial(disk.write, at, new),
                "zero": partial(disk.zero, at, size),
                "discard": partial(disk.discard, 0, SIZE),
                "resize": partial(disk.resize, SIZE - 2 * CLUSTER),
                "flush": disk.flush,
            }
            async with trio.open_nursery() as nursery:
                nursery.start_soon(calls[way])
                for _ in range(checkpoints):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert disk.size in ((SIZE, SIZE - 2 * CLUSTER) if way == "resize" else (SIZE,))
            found = bytes(await disk.read(0, disk.size))
            changed = {"write": new, "zero": bytes(size)}.get(way)
            for start in range(0, len(found), SECTOR_SIZE):
                sector = found[start : start + SECTOR_SIZE]
                possible = [old[start : start + SECTOR_SIZE]]
                if changed is not None and at <= start < at + size:
                    possible.append(changed[start - at : start - at + SECTOR_SIZE])
                if way == "discard":
                    possible.append(bytes(SECTOR_SIZE))
                assert sector in possible, f"sector at {start}"
            it.model[:] = found
            await disk.flush()
            await it.expect_durable()
            await disk.write(at, new)
            it.model[at : at + size] = new
            await it.expect_model()

    for checkpoints in range(12):
        trio.run(main, checkpoints)
