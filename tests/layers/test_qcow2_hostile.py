"""qcow2 files that are cut off, damaged or made to harm: data as QEMU reads it, or a plain error, in bounded time."""

from __future__ import annotations

import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qedfuse.errors import QedfuseError
from qedfuse.layers.qcow2.entries import compressed_extent
from qedfuse.layers.resolve import read_layer
from qedfuse.layers.runs import Kind, Run
from qedfuse.sizes import HostOffset
from qedfuse.text import describe
from tests.helpers.images.qcow2_images import (
    COMPATS,
    OFFSET,
    assert_corrupt,
    be64,
    create,
    l1_offset,
    l2_offset,
    noise,
    open_qcow2,
    poke,
    qemu_io,
    qemu_refuses,
    run,
    runs_of,
    same,
)
from tests.helpers.images.qcow2_victims import DAMAGES, Damage, Victim


class TestEndOfFile:
    def test_short_last_cluster(self, tmp_path: Path) -> None:
        """Bytes past the end of the file read as zeroes: the run is clipped there."""
        image = create(tmp_path / "a.qcow2", 1 << 20)
        qemu_io(image, "write -P 1 0 128k")
        end = image.stat().st_size - 5000
        with image.open("r+b") as file:
            file.truncate(end)
        same(image, pieces=(1 << 20, 4096, 77))

        async def check() -> None:
            layer = await open_qcow2(image)
            try:
                runs = await runs_of(layer)
                assert [(run.kind, run.length) for run in runs[:2]] == [
                    (Kind.DATA, (128 << 10) - 5000),
                    (Kind.ZERO, 5000),
                ]
                assert runs[0].host + runs[0].length == end
                assert await layer.map((128 << 10) - 3000, 3000) == [Run(Kind.ZERO, 3000)]
            finally:
                await layer.close()

        run(check)

    def test_compressed_at_the_end(self, tmp_path: Path) -> None:
        """The last stream ends the file, inside the sector that its entry names."""
        image = create(tmp_path / "a.qcow2", 1 << 20)
        qemu_io(image, "write -c -P 5 0 64k")
        assert image.stat().st_size % 512
        same(image)

    @pytest.mark.parametrize("cut", ["data", "table", "stream"])
    def test_cut_off(self, tmp_path: Path, cut: str) -> None:
        """A file that was copied in part is no source of zeroes."""
        image = create(tmp_path / "a.qcow2", 1 << 20)
        qemu_io(image, "write -P 1 0 64k", "write -P 2 64k 64k", "write -c -P 3 512k 64k")
        data = be64(image, l2_offset(image) + 8) & OFFSET
        stream, _size = compressed_extent(be64(image, l2_offset(image) + 64), 16)
        with image.open("r+b") as file:
            file.truncate({"data": data, "table": l2_offset(image), "stream": stream + 7}[cut])
        at = {"data": 64 << 10, "table": 0, "stream": 512 << 10}[cut]
        assert_corrupt(image, at, "" if cut == "stream" else "past the end of the file")

    def test_image_in_use_grows(self, tmp_path: Path) -> None:
        image = create(tmp_path / "a.qcow2", 1 << 20)

        async def check() -> None:
            layer = await open_qcow2(image)
            try:
                assert layer.map_nowait(0, 512) is None
                qemu_io(image, "write -P 1 0 64k")
                assert await layer.map(0, 65536) == [
                    Run(Kind.DATA, 65536, HostOffset(be64(image, l2_offset(image)) & OFFSET))
                ]
                assert await read_layer(layer, 0, 65536) == b"\1" * 65536
            finally:
                await layer.close()

        run(check)


class TestHostileTables:
    @pytest.fixture
    def image(self, tmp_path: Path) -> Path:
        image = create(tmp_path / "a.qcow2", 1 << 20)
        qemu_io(image, "write -P 1 0 64k", "write -c -P 2 64k 64k")
        return image

    def test_l2_table_misaligned(self, image: Path) -> None:
        poke(image, l1_offset(image), struct.pack(">Q", l2_offset(image) + 512))
        assert_corrupt(image, 0, "l2 table of guest offset 0 is not cluster-aligned")
        assert qemu_refuses(image)

    def test_data_misaligned(self, image: Path) -> None:
        entry = l2_offset(image)
        poke(image, entry, struct.pack(">Q", be64(image, entry) + 512))
        assert_corrupt(image, 100, "not cluster-aligned")
        assert qemu_refuses(image)

    def test_zero_flag_in_version_2(self, tmp_path: Path) -> None:
        image = create(tmp_path / "a.qcow2", 1 << 20, "compat=0.10")
        qemu_io(image, "write -P 1 0 64k")
        entry = l2_offset(image)
        poke(image, entry, struct.pack(">Q", be64(image, entry) | 1))
        assert_corrupt(image, 0, "version 3")
        assert qemu_refuses(image)

    @pytest.mark.parametrize("offset", [1 << 40, OFFSET & ~0xFFFF])
    def test_tables_and_data_far_away(self, image: Path, offset: int) -> None:
        table = l2_offset(image)
        poke(image, table, struct.pack(">Q", offset))
        assert_corrupt(image, 0, "past the end of the file")
        poke(image, l1_offset(image), struct.pack(">Q", offset))
        assert_corrupt(image, 0, "past the end of the file")

    def test_reserved_bits_are_ignored(self, image: Path) -> None:
        """As QEMU does: what it reads, we read."""
        poke(image, l1_offset(image), struct.pack(">Q", be64(image, l1_offset(image)) | 0x7F00_0000_0000_01FF))
        entry = l2_offset(image)
        poke(image, entry, struct.pack(">Q", be64(image, entry) | 0x3F00_0000_0000_01FE))
        same(image)

    def test_tables_that_point_at_themselves(self, image: Path) -> None:
        table = l2_offset(image)
        poke(image, table, struct.pack(">QQQQ", table, 0, 65536, 131072))  # the last two: refcounts, behind a gap
        same(image)
        same(image, pieces=(4096,))

    def test_broken_stream(self, image: Path) -> None:
        host, _size = compressed_extent(be64(image, l2_offset(image) + 8), 16)
        poke(image, host, b"\xff" * 40)
        assert_corrupt(image, 64 << 10, "cannot be decompressed")
        assert_corrupt(image, (128 << 10) - 512, "cannot be decompressed")

    def test_bomb(self, image: Path) -> None:
        """A stream with far more than a cluster in it: only the cluster is unpacked, as QEMU does."""
        put_stream(image, zlib.compress(bytes([7]) * (60 << 20), 9, -12)[: 60 << 10])
        same(image)

    def test_window_of_32_kib(self, image: Path) -> None:
        """Streams of other programs look further back than QEMU's 4 KiB; QEMU reads them."""
        put_stream(image, zlib.compress(noise(20000) * 4, 9, -15))
        same(image)

    def test_stream_too_short(self, image: Path) -> None:
        put_stream(image, zlib.compress(bytes([7]) * 65535, 9, -12))
        assert_corrupt(image, 64 << 10, "cannot be decompressed")
        poke(image, l2_offset(image), struct.pack(">Q", be64(image, l2_offset(image) + 8)))
        assert qemu_refuses(image)


def put_stream(image: Path, stream: bytes) -> None:
    """Make `stream` the compressed cluster at guest offset 64 KiB of an image with clusters of 64 KiB."""
    host = -(-image.stat().st_size // 65536) * 65536
    poke(image, host, stream.ljust(-(-len(stream) // 512) * 512, b"\0"))
    poke(image, l2_offset(image) + 8, struct.pack(">Q", 1 << 62 | (len(stream) - 1) // 512 << 54 | host))


@pytest.fixture(scope="module")
def victims() -> Iterator[list[Victim]]:
    directory = Path(tempfile.mkdtemp(prefix="qcow2-victims-"))
    try:
        yield [Victim(directory, size, compat) for size in (512, 65536) for compat in COMPATS]
    finally:
        shutil.rmtree(directory)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 3), damage=DAMAGES)
def test_any_bytes(victims: list[Victim], which: int, damage: Damage) -> None:
    """Whatever stands in the header, tables and streams: bytes or a plain error, within bounded time."""
    victim = victims[which]
    path = victim.path.with_suffix(".mutant")
    path.write_bytes(victim.mutant(damage))
    started = time.monotonic()
    run(lambda: survey(path))
    assert time.monotonic() - started < 5


async def survey(path: Path) -> None:
    """Open, map and read what a caller may: the start, the end, the middle. Only plain errors may come out."""
    with plain_errors(path):
        layer = await open_qcow2(path)
        try:
            for at in {0, 1, layer.size // 3, max(0, layer.size - (1 << 20))}:
                length = min(1 << 20, layer.size - at)
                if length > 0:
                    with plain_errors(path):
                        assert len(await read_layer(layer, at, length)) == length
                    with plain_errors(path):
                        runs = await layer.map(at, layer.size - at)
                        assert 0 < sum(run.length for run in runs) <= layer.size - at
        finally:
            await layer.close()


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Let errors with a line for a person pass, and no others."""
    line = f"{path}: x"
    try:
        yield
    except QedfuseError as error:
        line = describe(error)
    assert line.startswith(f"{path}: ") and "\n" not in line
