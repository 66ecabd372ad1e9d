"""What every `Layer` promises: raw files, QED and qcow2 images that QEMU has made, alone and over each other."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from qedfuse.chain.chain import open_layer
from qedfuse.host.storage import read
from qedfuse.layers.extents import HostExtents
from qedfuse.layers.layer import Layer, layers_of
from qedfuse.layers.resolve import read_layer
from qedfuse.layers.runs import NO_PLACE, Kind, Run, append_run
from qedfuse.qed.image import Image
from tests.helpers.doubles.ram import Chaos, RamStorage
from tests.helpers.images.conversions import flat, make_chain, scatter
from tests.helpers.images.images import POOL, Chain, new_chain, open_chain, raw_file
from tests.helpers.judges.expect import raises_errno
from tests.helpers.qemu.cli import qemu_img

SIZE = 3 << 20

#: Bottom first.
CHAINS = {
    "raw": [("raw", SIZE)],
    "raw, ends in a sector": [("raw", SIZE - 100)],
    "qed": [("qed", SIZE)],
    "qed over raw": [("raw", SIZE // 2), ("qed", SIZE)],
    "qed over a longer qed": [("qed", SIZE), ("qed", SIZE // 2 + 512)],
    "qcow2": [("qcow2", SIZE)],
    "qcow2 over raw": [("raw", SIZE // 2), ("qcow2", SIZE)],
    "qcow2 over qed": [("qed", SIZE), ("qcow2", SIZE)],
    "qed over qcow2": [("qcow2", SIZE // 2), ("qed", SIZE)],
}
OTHERS = ["qcow2, compressed", "qed in RAM, written"]


@dataclass
class Subject:
    """How to open a layer, and what it must show."""

    opening: Callable[[], Awaitable[Layer]]
    content: bytes
    format: str
    below: str | None


@pytest.fixture(params=[*CHAINS, *OTHERS])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    kind = str(request.param)
    if kind == "qed in RAM, written":
        return trio.run(_in_ram)
    if kind == "qcow2, compressed":
        scatter(source := make_chain(tmp_path, ("raw", SIZE)), "raw", SIZE, 5)
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", source, path := tmp_path / "compressed.qcow2")
        formats = ["qcow2"]
    else:
        layers = CHAINS[kind]
        path = make_chain(tmp_path, *layers, options="cluster_size=4096,table_size=2")
        formats = [format for format, _ in layers]
    content = flat(path).read_bytes()
    content = content.ljust(-(-len(content) // 512) * 512, b"\0")
    return Subject(lambda: open_layer(path, formats[-1]), content, formats[-1], formats[-2] if formats[1:] else None)


async def _in_ram() -> Subject:
    """An image that is open for writing, with tables that are in memory only, on a host that answers when it likes."""
    below = random.Random(1).randbytes(SIZE // 2)
    chain = await new_chain(SIZE, below=[(raw_file(below), "raw")])
    model = bytearray(below.ljust(SIZE, b"\0"))

    async def write(image: Image) -> None:
        for offset, size in ((5000, 9000), (SIZE // 2 - 1000, 3000), (SIZE - 512, 512)):
            model[offset : offset + size] = bytes([offset % 251 + 1]) * size
            await image.write(offset, model[offset : offset + size])
        model[65536 : 65536 + 8192] = bytes(8192)
        await image.zero(65536, 8192)

    async def opening() -> Layer:
        fresh = Chain(chain.file.fork(), chain.below)
        image = await open_chain(fresh, RamStorage("ram", fresh.file, chaos=Chaos(3)), pool=POOL)
        await write(image)
        return image

    await (await opening()).close()  # for the model
    return Subject(opening, bytes(model), "qed", "raw")


@asynccontextmanager
async def opened(subject: Subject) -> AsyncIterator[Layer]:
    layer = await subject.opening()
    try:
        yield layer
    finally:
        await layer.close()


async def mapped(layer: Layer, offset: int, size: int, extents: HostExtents | None = None) -> list[Run]:
    """The runs of a range, by as many calls as are needed, merged; and that each call keeps what it promises."""
    result: list[Run] = []
    position = offset
    while position < offset + size:
        runs = await layer.map(position, offset + size - position, extents)
        covered = sum(run.length for run in runs)
        assert 0 < covered <= offset + size - position
        expect_merged(runs)
        for run in runs:
            append_run(result, *run)
        position += covered
    return result


def expect_merged(runs: list[Run]) -> None:
    again: list[Run] = []
    for run in runs:
        assert run.length > 0
        assert not run.host or run.kind in (Kind.DATA, Kind.ZERO)
        append_run(again, *run)
    assert again == runs, "neighbours that continue each other"


def part_of(runs: list[Run], offset: int, size: int) -> list[Run]:
    """Of runs that begin at 0, what they say of a range."""
    found: list[Run] = []
    start = 0
    for kind, length, host in runs:
        low, high = max(start, offset), min(start + length, offset + size)
        if low < high:
            append_run(found, kind, high - low, host + low - start if host or kind is Kind.DATA else NO_PLACE)
        start += length
    return found


def ranges(size: int) -> list[tuple[int, int]]:
    rnd = random.Random(2)
    found = [(0, size), (0, 1), (size - 1, 1), (511, 2), (4095, 2), (size // 2 - 1, 4096)]
    for _ in range(40):
        offset = rnd.randrange(size)
        found.append((offset, min(rnd.choice([1, 512, 4096, 70_001, size]), size - offset)))
    return found


def test_what_it_is(subject: Subject) -> None:
    async def main() -> None:
        async with opened(subject) as layer:
            assert (layer.size, layer.format) == (len(subject.content), subject.format)
            assert layer.path == layer.storage.path
            assert [below.format for below in layers_of(layer.backing)] == ([subject.below] if subject.below else [])
            assert [*layers_of(layer)] == [layer, *layers_of(layer.backing)]

    trio.run(main)


def test_any_part_is_mapped_as_the_whole(subject: Subject) -> None:
    """By `map`, and by `map_nowait` if it knows: then exactly, and without a gap."""

    async def main() -> None:
        async with opened(subject) as layer:
            version = layer.version
            whole = await mapped(layer, 0, layer.size)
            assert sum(run.length for run in whole) == layer.size
            answered = 0
            for offset, size in ranges(layer.size):
                expected = part_of(whole, offset, size)
                assert await mapped(layer, offset, size) == expected
                runs = layer.map_nowait(offset, size)
                if runs is not None:
                    answered += 1
                    expect_merged(runs)
                    assert runs == expected
            assert answered, "what is in memory is mapped without waiting"
            assert layer.version == version, "nothing has changed"

    trio.run(main)


def test_holes_of_the_host_change_no_answer(subject: Subject) -> None:
    async def main() -> None:
        async with opened(subject) as layer:
            whole = await mapped(layer, 0, layer.size)
        async with opened(subject) as layer:  # with no table in memory
            extents = HostExtents(layer.storage)
            for offset, size in ranges(layer.size):
                assert await mapped(layer, offset, size, extents) == part_of(whole, offset, size)

    trio.run(main)


def test_the_runs_say_where_the_bytes_are(subject: Subject) -> None:
    """What a reader finds who follows them is what QEMU reads; what is told of the layer below is asked there."""

    async def follow(layer: Layer | None, offset: int, size: int) -> bytes:
        inside = max(0, min(size, layer.size - offset)) if layer else 0
        if layer is None or not inside:
            return bytes(size)
        parts = []
        position = offset
        for kind, length, host in await mapped(layer, offset, inside):
            if kind is Kind.DATA:
                parts.append(await read(layer.storage, host, length))
            elif kind is Kind.INDIRECT:
                parts.append(await layer.read_indirect(position, length))
            elif kind is Kind.ZERO:
                parts.append(bytes(length))
            else:
                parts.append(await follow(layer.backing, position, length))
            position += length
        return b"".join(parts) + bytes(size - inside)

    async def main() -> None:
        async with opened(subject) as layer:
            for offset, size in ranges(layer.size):
                wanted = subject.content[offset : offset + size]
                assert await follow(layer, offset, size) == wanted
                assert await read_layer(layer, offset, size) == wanted
            behind = await read_layer(layer, layer.size - 10, 30)
            assert behind == subject.content[-10:] + bytes(20), "zeroes past its end"

    trio.run(main)


def test_closed_with_what_is_below(subject: Subject) -> None:
    async def main() -> None:
        async with opened(subject) as layer:
            layers = [*layers_of(layer)]
            await layer.close()
            await layer.close()
            for closed in layers:
                with raises_errno(errno.EBADF):
                    await closed.storage.read_into(0, memoryview(bytearray(1)))

    trio.run(main)


def test_the_test_meets_all_kinds(tmp_path: Path) -> None:
    """Else the suite would ask less than it says."""
    found = set()
    for name in ("qed over raw", "qcow2 over raw"):
        directory = tmp_path / name
        directory.mkdir()
        path = make_chain(directory, *CHAINS[name], options="cluster_size=4096,table_size=2")

        async def kinds(path: Path = path) -> set[Kind]:
            layer = await open_layer(path, path.suffix[1:])
            try:
                return {run.kind for run in await mapped(layer, 0, layer.size)}
            finally:
                await layer.close()

        found |= trio.run(kinds)
    assert found >= {Kind.UNALLOCATED, Kind.ZERO, Kind.DATA}
