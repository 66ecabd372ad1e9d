"""qcow2 images by the real qemu-img and qemu-io, what QEMU reads of them, and ways to damage them."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from qedfuse.errors import CorruptError
from qedfuse.host.file_storage import FileStorage
from qedfuse.layers.layer import Layer
from qedfuse.layers.qcow2.header import Qcow2Header
from qedfuse.layers.qcow2.layer import Qcow2Layer, read_qcow2_header
from qedfuse.layers.raw import RawLayer
from qedfuse.layers.resolve import read_layer
from qedfuse.layers.runs import Run
from qedfuse.text import describe
from tests.helpers.qemu import cli
from tests.helpers.qemu.cli import qemu_img

T = TypeVar("T")

#: The offset in an L1 or standard L2 entry.
OFFSET = 0x00FF_FFFF_FFFF_FE00

CLUSTER_SIZES = [512, 64 << 10, 2 << 20]
COMPATS = ["0.10", "1.1"]


def run(function: Callable[[], Awaitable[T]]) -> T:
    return trio.run(function)


def qemu_io(image: Path, *commands: str) -> None:
    cli.qemu_io(image, *commands, format="qcow2")


def create(image: Path, size: int, *options: str, backing: Path | None = None, backing_format: str = "raw") -> Path:
    chain = ["-b", backing, "-F", backing_format] if backing else []
    qemu_img(
        "create", "-q", "-f", "qcow2", *[word for option in options for word in ("-o", option)], *chain, image, size
    )
    return image


def qemu_bytes(image: Path) -> bytes:
    """What QEMU reads."""
    raw = image.with_suffix(".flat")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, raw)
    return raw.read_bytes()


def qemu_refuses(image: Path) -> bool:
    command = ["qemu-io", "-r", "-f", "qcow2", str(image), "-c", "read 0 512"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode != 0 or "failed" in done.stdout


async def open_qcow2(image: Path, backing: Layer | None = None) -> Qcow2Layer:
    storage = FileStorage.open(image, False)
    try:
        return await Qcow2Layer.open(storage, backing)
    except BaseException:
        await storage.close()
        raise


def raw_layer(path: Path) -> RawLayer:
    return RawLayer.open(FileStorage.open(path, False))


async def read_all(layer: Layer, piece: int) -> bytes:
    parts = [await read_layer(layer, at, min(piece, layer.size - at)) for at in range(0, layer.size, piece)]
    return b"".join(parts)


async def runs_of(layer: Layer) -> list[Run]:
    """All of a layer's runs, as `map` gives them; what is cached then must map without waiting, the same way."""
    result: list[Run] = []
    at = 0
    while at < layer.size:
        runs = await layer.map(at, layer.size - at)
        covered = sum(run.length for run in runs)
        assert 0 < covered <= layer.size - at
        assert all(run.length > 0 for run in runs)
        assert layer.map_nowait(at, covered) == runs
        result += runs
        at += covered
    return result


def same(
    image: Path, backing: Callable[[], Awaitable[Layer]] | None = None, pieces: tuple[int, ...] = (1 << 20,)
) -> None:
    """Assert that we read what QEMU reads, in pieces of any size."""
    expected = qemu_bytes(image)

    async def check() -> None:
        for piece in pieces:
            layer = await open_qcow2(image, await backing() if backing else None)
            try:
                assert layer.size == len(expected)
                found = await read_all(layer, piece)
                wrong = next(
                    (i for i in range(0, len(expected), 512) if found[i : i + 512] != expected[i : i + 512]), None
                )
                assert wrong is None and found == expected, f"differs at {wrong}, pieces of {piece}"
            finally:
                await layer.close()

    run(check)


def be64(image: Path, offset: int) -> int:
    with image.open("rb") as file:
        file.seek(offset)
        return int(struct.unpack(">Q", file.read(8))[0])


def poke(image: Path, offset: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def l1_offset(image: Path) -> int:
    return be64(image, 40)


def l2_offset(image: Path) -> int:
    """Where the first L2 table lies."""
    return be64(image, l1_offset(image)) & OFFSET


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def assert_corrupt(image: Path, at: int, words: str) -> None:
    async def check() -> None:
        layer = await open_qcow2(image)
        try:
            with pytest.raises(CorruptError) as caught:
                await read_layer(layer, at, 512)
            assert caught.value.path == str(image) and words in str(caught.value)
            assert describe(caught.value).startswith(f"{image}: ") and "\n" not in describe(caught.value)
        finally:
            await layer.close()

    run(check)


def header_of(image: Path) -> Qcow2Header:
    async def read() -> Qcow2Header:
        storage = FileStorage.open(image, False)
        try:
            return await read_qcow2_header(storage)
        finally:
            await storage.close()

    return run(read)
