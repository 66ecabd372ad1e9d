"""What every `Disk` promises of its bytes: the engine's image, and the one that programs get."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from qedfuse.layers.runs import Kind, Run
from qedfuse.sizes import SECTOR_SIZE, round_up
from tests.helpers.images.disks import CLUSTER, ENGINE, KINDS, SIZE, Opened, opened
from tests.helpers.images.images import read_header


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_says_of_itself(kind: str) -> None:
    async def main() -> None:
        async with opened(kind) as it:
            assert (it.disk.path, it.disk.size, it.disk.writable, it.disk.failed) == ("ram", SIZE, True, None)
        async with opened(kind, writable=False) as it:
            assert (it.disk.path, it.disk.size, it.disk.writable, it.disk.failed) == ("ram", SIZE, False, None)

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_end_where_the_disk_ends(kind: str) -> None:
    async def main() -> None:
        async with opened(kind) as it:
            data = random.Random(3).randbytes(5 * CLUSTER)
            await it.disk.write(SIZE - len(data), data)
            it.model[SIZE - len(data) :] = data
            for offset, size in ((0, SIZE), (0, SIZE + 1), (SIZE - 1, 5), (SIZE, 5), (SIZE + 4096, 5), (3, 0)):
                assert await it.disk.read(offset, size) == it.model[offset : offset + size]

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_against_a_model(kind: str) -> None:
    """Any offset and size: what is written, zeroed, discarded, cut off and added reads as it should, at once. Then all
    that was flushed is durable, and so is a smaller size."""

    async def change(it: Opened, rnd: random.Random) -> None:
        disk, model = it.disk, it.model
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
                await it.expect_durable()
            case "resize":
                wanted = rnd.choice([len(model), len(model) + 5000, max(1, len(model) - 9000)])
                await disk.resize(wanted)
                end = round_up(wanted, SECTOR_SIZE)
                if end < len(model):
                    assert read_header(it.durable()).image_size == end
                del model[wanted:]
                model.extend(bytes(end - len(model)))

    async def main() -> None:
        rnd = random.Random(5)
        async with opened(kind) as it:
            for _ in range(200):
                await change(it, rnd)
                await it.expect_model()

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_the_callers_again(kind: str) -> None:
    """A buffer once its write has returned, and the bytes that a read has given, which may be changed."""

    async def main() -> None:
        async with opened(kind) as it:
            for number, convert in enumerate((bytes, bytearray, memoryview)):
                buffer = bytearray(random.Random(number).randbytes(2 * CLUSTER))
                data: Any = convert(buffer)
                at = 512 + number * 3 * CLUSTER
                for _ in range(2):  # into new clusters, and in place
                    await it.disk.write(at, data)
                    it.model[at : at + len(data)] = data
                    for memory in (data, buffer):
                        if not isinstance(memory, bytes):
                            memory[:] = bytes(byte ^ 0xFF for byte in memory)
                    found = await it.disk.read(at - 512, 3 * CLUSTER)
                    assert found == it.model[at - 512 : at - 512 + 3 * CLUSTER]
                    if isinstance(found, bytearray):
                        found[:] = b"!" * len(found)
            await it.expect_model()
            await it.disk.flush()
            await it.expect_durable()

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_that_meet_in_a_cluster(kind: str) -> None:
    """Each has a sector of every cluster; flushes and reads come between. What a task has written it reads."""

    async def work(it: Opened, mine: int) -> None:
        for cluster in (3, 4, 3, 30):
            at = cluster * CLUSTER + mine * SECTOR_SIZE
            data = bytes([1 + mine + 8 * cluster]) * SECTOR_SIZE
            await it.disk.write(at, data)
            it.model[at : at + SECTOR_SIZE] = data
            assert await it.disk.read(at, SECTOR_SIZE) == data
            if mine % 2:
                await it.disk.flush()

    async def main() -> None:
        async with opened(kind) as it:
            async with trio.open_nursery() as nursery:
                for mine in range(CLUSTER // SECTOR_SIZE):
                    nursery.start_soon(work, it, mine)
            await it.expect_model()
            await it.disk.flush()
            await it.expect_durable()

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_discard_leaves_the_edges(kind: str) -> None:
    async def main() -> None:
        async with opened(kind) as it:
            await it.disk.write(0, b"x" * 4 * CLUSTER)
            await it.disk.discard(CLUSTER - 1, 2 * CLUSTER)
            it.model[: 4 * CLUSTER] = b"x" * CLUSTER + bytes(CLUSTER) + b"x" * 2 * CLUSTER
            await it.expect_model()

    trio.run(main)


@pytest.mark.parametrize("way", ["zero", "discard"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_has_its_space_back(kind: str, way: str) -> None:
    async def main() -> None:
        async with opened(kind) as it:
            await it.disk.write(0, b"x" * 20 * CLUSTER)
            await it.disk.flush()
            held = len(it.host.file.pages)
            await (it.disk.zero if way == "zero" else it.disk.discard)(100, 18 * CLUSTER)
            await it.disk.flush()
            assert len(it.host.file.pages) <= held - 17
            start, end = (100, 100 + 18 * CLUSTER) if way == "zero" else (CLUSTER, 18 * CLUSTER)
            it.model[: 20 * CLUSTER] = b"x" * start + bytes(end - start) + b"x" * (20 * CLUSTER - end)
            await it.expect_model()
            await it.expect_durable()

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_says_where_the_bytes_are(kind: str) -> None:
    """From where it is asked to: something, and no more than was asked for."""

    def expect(it: Opened, offset: int, run: Run) -> None:
        content = it.model[offset : offset + run.length]
        if run.kind is Kind.DATA:
            assert it.host.file.read(run.host, run.length) == content
        elif run.kind is Kind.ZERO:
            assert not any(content)
        else:
            assert run.kind is Kind.UNALLOCATED
            assert content == it.below[offset : offset + run.length].ljust(run.length, b"\0"), "it is not from below"

    async def main() -> None:
        async with opened(kind) as it:
            data = random.Random(4).randbytes(9000)
            await it.disk.write(5000, data)
            await it.disk.write(25 * CLUSTER, data)
            await it.disk.zero(30 * CLUSTER, 2 * CLUSTER)
            it.model[5000:14000] = it.model[25 * CLUSTER : 25 * CLUSTER + 9000] = data
            it.model[30 * CLUSTER : 32 * CLUSTER] = bytes(2 * CLUSTER)
            for offset in (0, 1, 5000, 4095, 30 * CLUSTER, SIZE - 1):
                while offset < SIZE:
                    runs = await it.disk.map(offset, SIZE - offset)
                    assert 0 < sum(run.length for run in runs) <= SIZE - offset and all(run.length for run in runs)
                    for run in runs:
                        expect(it, offset, run)
                        offset += run.length
            [run] = await it.disk.map(5000, 100)
            assert (run.kind, run.length) == (Kind.DATA, 100)
            [run] = await it.disk.map(20 * CLUSTER + 1, CLUSTER)
            assert run.length == CLUSTER and run.kind is not Kind.DATA
            assert await it.disk.map(5000, 0) == []

    trio.run(main)


@pytest.mark.parametrize("kind", ENGINE)
def test_the_version_tells_what_may_have_changed(kind: str) -> None:
    async def main() -> None:
        async with opened(kind) as it:
            disk = it.disk
            changes: list[Callable[[], Awaitable[None]]] = [
                lambda: disk.write(0, b"x" * CLUSTER),
                lambda: disk.write(0, b"y" * CLUSTER),  # in place: it may fill a hole
                lambda: disk.zero(0, CLUSTER),
                lambda: disk.write(8 * CLUSTER, b"x" * CLUSTER),
                lambda: disk.discard(8 * CLUSTER, CLUSTER),
                lambda: disk.resize(SIZE + 512),
                lambda: disk.resize(512),
            ]
            seen = {disk.version}
            for change in changes:
                version = disk.version
                await disk.read(0, 4096)
                await disk.map(0, 512)
                assert disk.version == version
                await change()
                assert disk.version not in seen, "a version comes again"
                seen.add(disk.version)

    trio.run(main)
