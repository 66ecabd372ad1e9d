"""The read-only qcow2 layer against images that qemu-img and qemu-io made, byte for byte; its caches."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import trio

from qedfuse.host.file_storage import FileStorage
from qedfuse.layers.layer import Layer
from qedfuse.layers.qcow2 import layer as qcow2
from qedfuse.layers.qcow2 import unpack
from qedfuse.layers.qcow2.entries import inflate
from qedfuse.layers.qcow2.layer import Qcow2Layer, read_qcow2_header
from qedfuse.layers.resolve import read_layer
from qedfuse.layers.runs import Kind, Run
from tests.helpers.images.qcow2_images import (
    CLUSTER_SIZES,
    COMPATS,
    create,
    open_qcow2,
    qemu_bytes,
    qemu_io,
    raw_layer,
    run,
    runs_of,
    same,
)
from tests.helpers.qemu.cli import qemu_img


@pytest.fixture
def pattern(tmp_path: Path) -> Path:
    """8 MiB + 5 sectors that partly compress."""
    path = tmp_path / "pattern.raw"
    words = random.Random(7)
    blocks = [words.randbytes(256) * words.randrange(1, 40) + bytes(words.randrange(0, 9000)) for _ in range(1500)]
    path.write_bytes(b"".join(blocks)[: (8 << 20) + 5 * 512])
    assert path.stat().st_size == (8 << 20) + 5 * 512
    return path


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
class TestAgainstQemu:
    def test_all_kinds(self, tmp_path: Path, cluster_size: int, compat: str) -> None:
        """Data, zeroes, compressed and unallocated, in clusters and across them; the size ends inside a cluster."""
        size = 5 * (2 << 20) + 3 * 512
        image = create(tmp_path / "a.qcow2", size, f"cluster_size={cluster_size},compat={compat}")
        c = cluster_size
        qemu_io(image, f"write -c -P 0x11 0 {c}", f"write -c -P 0x12 {c} {c}", f"write -P 0x21 {2 * c} {c}")
        qemu_io(image, f"write -P 0x22 {4 * c - 512} 1024", "write -P 0x23 9000000 100000", f"write -z {2 * c} {c}")
        qemu_io(image, f"write -z 9050000 {1 << 17}", f"write -P 0x24 {size - 700} 700")
        same(image, pieces=(1 << 20, 3 * c // 2 + 1 if c < 1 << 20 else 700001, 9973))

    def test_compressed_by_convert(self, tmp_path: Path, pattern: Path, cluster_size: int, compat: str) -> None:
        image = tmp_path / "c.qcow2"
        options = f"cluster_size={cluster_size},compat={compat}"
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, pattern, image)
        assert qemu_bytes(image) == pattern.read_bytes()
        same(image, pieces=(1 << 20, 4096, 70001))

        async def kinds() -> set[Kind]:
            layer = await open_qcow2(image)
            try:
                return {run.kind for run in await runs_of(layer)}
            finally:
                await layer.close()

        assert Kind.INDIRECT in run(kinds)

    def test_backing(self, tmp_path: Path, pattern: Path, cluster_size: int, compat: str) -> None:
        """qcow2 on qcow2 on raw, each of another length, through layers put together by hand."""
        c = cluster_size
        middle = create(tmp_path / "m.qcow2", 5 * (2 << 20) + 512, f"cluster_size={c},compat={compat}", backing=pattern)
        qemu_io(middle, f"write -P 0x31 {c - 512} 1024", "write -z 3000000 1000000", "write -P 0x32 8380000 20000")
        top = create(tmp_path / "t.qcow2", 6 * (2 << 20), "cluster_size=4096", backing=middle, backing_format="qcow2")
        qemu_io(top, "write -P 0x41 3500000 5000", "write -z 1000000 10000", f"write -P 0x42 {5 * (2 << 20)} 512")

        async def chain() -> Layer:
            return await open_qcow2(middle, raw_layer(pattern))

        same(middle, lambda: to_layer(raw_layer(pattern)), pieces=(1 << 20, 123457))
        same(top, chain, pieces=(1 << 20, 123457))

    def test_preallocated_and_resized(self, tmp_path: Path, cluster_size: int, compat: str) -> None:
        options = f"cluster_size={cluster_size},compat={compat},preallocation=metadata"
        image = create(tmp_path / "p.qcow2", 3000 * 1024, options)
        qemu_io(image, "write -P 0x51 1234432 5000")
        qemu_img("resize", "-q", image, 7 << 20)
        qemu_io(image, f"write -P 0x52 {(7 << 20) - 512} 512")
        same(image)


async def to_layer(layer: Layer) -> Layer:
    return layer


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_random_operations(tmp_path: Path, cluster_size: int) -> None:
    """A long mixed history, overwriting and discarding, with an internal snapshot on the way."""
    choice = random.Random(cluster_size)
    size = 6 << 20
    image = create(tmp_path / "r.qcow2", size, f"cluster_size={cluster_size},lazy_refcounts=on")
    for step in range(3):
        commands = []
        for _ in range(30):
            at = choice.randrange(0, size // 512) * 512
            length = min(choice.choice([512, 4096, 66048, 300032]), size - at)
            commands.append(
                choice.choice([f"write -P {choice.randrange(1, 256)}", "write -z", "discard"]) + f" {at} {length}"
            )
        qemu_io(image, *commands)
        if step == 0:
            qemu_img("snapshot", "-c", "one", image)
    same(image, pieces=(1 << 20, 50001))


def test_runs_are_merged(tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", 1 << 20)
    qemu_io(image, "write -P 1 0 256k", "write -z 512k 192k", "write -c -P 2 768k 64k", "write -c -P 3 832k 64k")

    async def check() -> None:
        layer = await open_qcow2(image)
        try:
            runs = await runs_of(layer)
            k = 1 << 10
            assert [(run.kind, run.length) for run in runs] == [
                (Kind.DATA, 256 * k),
                (Kind.UNALLOCATED, 256 * k),
                (Kind.ZERO, 192 * k),
                (Kind.UNALLOCATED, 64 * k),
                (Kind.INDIRECT, 128 * k),
                (Kind.UNALLOCATED, 128 * k),
            ]
            # an unaligned part of a merged run
            (part,) = await layer.map(70001, 100000)
            assert part == Run(Kind.DATA, 100000, runs[0].host + 70001)
            assert await layer.read_indirect((832 << 10) - 5, 10) == b"\2" * 5 + b"\3" * 5
        finally:
            await layer.close()

    run(check)


def test_sparse_map_is_short_work(tmp_path: Path) -> None:
    """1 TiB with one cluster written: `map` goes over what has no L2 table in large steps, and never gives nothing."""
    image = create(tmp_path / "big.qcow2", 1 << 40, "cluster_size=64k")
    qemu_io(image, "write -P 9 700G 64k")

    async def check() -> None:
        layer = await open_qcow2(image)
        try:
            (first,) = await layer.map(0, layer.size)
            assert first == Run(Kind.UNALLOCATED, 32 * (512 << 20))  # 32 tables, of 512 MiB each
            assert layer.map_nowait(0, layer.size) is None
            runs: dict[Kind, int] = {}
            for kind, length, _host in await runs_of(layer):
                runs[kind] = runs.get(kind, 0) + length
            assert runs == {Kind.DATA: 65536, Kind.UNALLOCATED: (1 << 40) - 65536}
            assert await read_layer(layer, 700 << 30, 512) == b"\x09" * 512
        finally:
            await layer.close()

    run(check)


class Counting(FileStorage):
    """Records the reads; nothing is at hand, so all of them go through `read_into`."""

    reads: list[tuple[int, int]]

    def read_into_nowait(self, offset: int, target: memoryview) -> bool:
        return False

    async def read_into(self, offset: int, target: memoryview) -> None:
        self.reads.append((offset, len(target)))
        await super().read_into(offset, target)


def counting(image: Path) -> Counting:
    storage = Counting.open(image, False)
    assert isinstance(storage, Counting)
    storage.reads = []
    return storage


def test_cold_lookup_reads_pages(tmp_path: Path) -> None:
    """With 2 MiB tables, a cold lookup takes one page of L1 and one of L2; the next one in that page takes nothing."""
    image = create(tmp_path / "a.qcow2", 1 << 40, "cluster_size=2M")
    qemu_io(image, "write -P 1 600G 4k")

    async def check() -> None:
        storage = counting(image)
        layer = Qcow2Layer(storage, await read_qcow2_header(storage), None)
        try:
            storage.reads.clear()
            assert layer.map_nowait(600 << 30, 4096) is None
            await layer.map(600 << 30, 4096)
            l1_bytes = -(-(1 << 40) // (1 << 39)) * 8
            assert [size for _offset, size in storage.reads] == [l1_bytes, 4096]
            assert layer.map_nowait((600 << 30) + 4096, 4096) is not None
            assert len(storage.reads) == 2
        finally:
            await layer.close()

    run(check)


def test_table_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qcow2, "TABLE_CACHE_BYTES", 8 * (512 + qcow2._PAGE_OVERHEAD))
    image = create(tmp_path / "a.qcow2", 4 << 20, "cluster_size=512,preallocation=metadata")

    async def check() -> None:
        storage = counting(image)
        layer = Qcow2Layer(storage, await read_qcow2_header(storage), None)
        try:
            assert len(await runs_of(layer)) >= 1
            assert len(layer._tables._items) == 8
            assert len(storage.reads) > 128  # every L2 table was loaded
        finally:
            await layer.close()

    run(check)


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_compressed_cluster_is_unpacked_once(
    tmp_path: Path, cluster_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small reads of a compressed cluster, in turn or sixteen at once, unpack it once; memory is bounded."""
    image = create(tmp_path / "a.qcow2", 8 << 20, f"cluster_size={cluster_size}")
    qemu_io(image, *[f"write -c -P {i + 1} {i * cluster_size} {cluster_size}" for i in range(4)])
    unpacked: list[int] = []

    def count(raw: bytes, size: int) -> bytes | None:
        unpacked.append(size)
        assert (threading.current_thread() is threading.main_thread()) == (size <= 64 << 10)
        return inflate(raw, size)

    monkeypatch.setattr(unpack, "inflate", count)

    async def check() -> None:
        layer = await open_qcow2(image)
        step = max(cluster_size // 16, 32)

        async def read(at: int) -> None:
            assert await layer.read_indirect(at, step) == bytes([at // cluster_size + 1]) * step

        try:
            for at in range(0, cluster_size, step):
                await read(at)
            assert len(unpacked) == 1
            async with trio.open_nursery() as nursery:
                for at in range(cluster_size, 2 * cluster_size, step):
                    nursery.start_soon(read, at)
            assert len(unpacked) == 2
            await read(2 * cluster_size)
            await read(3 * cluster_size)
            kept = sum(map(len, layer._clusters._items.values()))
            assert kept <= max(qcow2.CLUSTER_CACHE_BYTES, cluster_size)
        finally:
            await layer.close()

    run(check)


def test_close_closes_the_chain(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(1 << 20))
    image = create(tmp_path / "a.qcow2", 1 << 20, backing=base)

    async def check() -> None:
        below = raw_layer(base)
        layer = await open_qcow2(image, below)
        await layer.close()
        await layer.close()
        for storage in (layer.storage, below.storage):
            with pytest.raises(OSError, match="Bad file descriptor"):
                storage.stat()

    run(check)
