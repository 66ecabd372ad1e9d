"""Coverage-guided fuzzing of qcow2 as a layer: an input is the image's bytes, read by itself and below a QED image.

How to run it: see `running.py`. Only OSErrors with one plain line may come out, in a bounded number of steps. What is
read must not depend on how it is asked for, and what happens below a QED image must not damage that.
"""

from __future__ import annotations

import importlib
import struct
import zlib

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

with atheris.instrument_imports(include=["qedfuse"]):
    for module in ("check.check", "qed.image", "layers.mapping", "chain.opening", "layers.qcow2.layer"):
        importlib.import_module(f"qedfuse.{module}")

import trio

from qedfuse.chain.backing import resolve_backing
from qedfuse.errors import QedfuseError
from qedfuse.layers.qcow2.layer import Qcow2Layer
from qedfuse.layers.raw import RawLayer
from qedfuse.layers.resolve import read_layer
from qedfuse.qed.image import Image
from qedfuse.qed.new_image import new_header, write_image
from tests.fuzz.running import assert_plain, run
from tests.helpers.doubles.ram import RamFile, RamStorage
from tests.helpers.images.images import POOL, TINY, assert_sound, raw_file, read_header
from tests.helpers.images.mutants import Fence, first_entries

LENGTH = 20_000
BELOW = b"below" * 3000


def target(data: bytes) -> None:
    trio.run(survey, raw_file(data))


async def survey(file: RamFile) -> None:
    backing = RawLayer.open(RamStorage("below", raw_file(BELOW), writable=False))
    storage = Fence("image", file, writable=False)
    try:
        layer = await Qcow2Layer.open(storage, backing)
        if layer.header.backing_name is not None:
            resolve_backing("image", layer.header.backing_name)
    except QedfuseError as error:
        assert_plain(error)
        return
    places = sorted({0, 1, 512, 5000, layer.size // 2, max(0, layer.size - 4096)})
    found = {at: await read(layer, at) for at in places if at < layer.size}
    for at in found:
        await look(layer, at)
    if layer.size:
        await put_below(layer, found)  # which closes it, too
    await layer.close()


async def read(layer: Qcow2Layer | Image, at: int) -> bytes | None:
    """What is at a place; None for an error."""
    length = min(LENGTH, layer.size - at)
    try:
        data = bytes(await read_layer(layer, at, length))
    except QedfuseError as error:
        assert_plain(error)
        return None
    assert len(data) == length
    return data


async def look(layer: Qcow2Layer, at: int) -> None:
    """Map it, and read it again in small pieces."""
    whole = await read(layer, at)
    try:
        runs = await layer.map(at, layer.size - at)
        assert 0 < sum(run.length for run in runs) <= layer.size - at
        assert all(run.length > 0 for run in runs)
        pieces = [await read_layer(layer, at + start, 700) for start in range(0, 7000, 700)]
    except QedfuseError as error:
        assert_plain(error)
        return
    assert whole is None or b"".join(pieces)[: len(whole)] == whole[:7000]


async def put_below(layer: Qcow2Layer, found: dict[int, bytes | None]) -> None:
    """A QED image over it reads the same, is written by copying from it, and stays sound whatever fails."""
    size = min(layer.size, 1 << 24)
    storage = RamStorage("image")
    await write_image(storage, new_header("image", size, TINY, b"base"), b"base")
    image = Image(storage, read_header(storage.file), layer, writable=True, pool=POOL)
    for at, data in found.items():
        if at < size:
            assert data is None or await image.read(at, LENGTH) == data[: size - at]
    try:
        await first_entries(image)
    except QedfuseError as error:
        assert_plain(error)
    for at in (700, 9000, size - 600):
        try:
            if 0 <= at < size - 100:
                await image.write(at, b"new" * 30)
                assert await image.read(at, 90) == b"new" * 30
        except QedfuseError as error:
            assert_plain(error)
    await image.close()
    await assert_sound(storage.file)


def small_qcow2(version: int, name: bytes = b"") -> bytes:
    """A qcow2 image of 64 KiB with clusters of 512 bytes: one of data, one of zeroes, one compressed, one not there."""
    cluster = 512
    stream = zlib.compress(b"compressed" * 51 + b"!!", 9, -12)
    place = 300 if name else 0
    head = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, place, len(name), 9, 1 << 16, 0, 2, cluster, 5 * cluster, 1, 0, 0
    )
    if version == 3:
        head += struct.pack(">QQQII", 0, 0, 0, 4, 104) + struct.pack(">II", 0xE2792ACA, 3) + b"raw\0\0\0\0\0"
    l1 = struct.pack(">QQ", 1 << 63 | 2 * cluster, 0)
    compressed = 1 << 62 | (len(stream) // 512) << 61 | 4 * cluster
    l2 = struct.pack(">QQQ", 1 << 63 | 3 * cluster, int(version == 3), compressed)
    parts = [head.ljust(300, b"\0") + name if name else head, l1, l2, b"data" * 128, stream, b""]
    return b"".join(part.ljust(cluster, b"\0") for part in parts)


SEEDS = {
    f"qcow2-{version}-{len(name)}": small_qcow2(version, name) for version in (2, 3) for name in (b"", b"base.raw")
}


if __name__ == "__main__":
    run(target, SEEDS)
