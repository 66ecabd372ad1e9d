"""truncate(2) of a raw file: what is cut off is gone, growth reads as zeroes. To the byte, and for QEMU, too."""

from __future__ import annotations

import mmap
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest

from qedfuse.chain.opening import open_image
from qedfuse.qed.image import Image
from tests.helpers.images.chains import check_is_clean, qemu_bytes, run
from tests.helpers.mounts.mounts import mounted
from tests.helpers.qemu.cli import qemu_img

CLUSTER = 64 << 10
SIZE = 1 << 20
BACKINGS = {"alone": 0, "shorter": 150_000, "longer": 2 * SIZE}


@pytest.fixture(params=BACKINGS)
def image(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "disk.qed"
    words: list[str] = []
    if BACKINGS[request.param]:
        (tmp_path / "base.raw").write_bytes(b"below..." * (BACKINGS[request.param] // 8))
        words = ["-b", str(tmp_path / "base.raw"), "-F", "raw"]
    qemu_img("create", "-q", "-f", "qed", *words, path, SIZE)
    return path


@pytest.mark.parametrize("options", [[], ["-o", "direct_io"]], ids=["buffered", "direct_io"])
def test_cut_and_grow(image: Path, raw: Path, options: list[str]) -> None:
    """Also what only the page cache had."""
    secret = b"SECRETSECRET" * 30_000
    with mounted(image, raw, *options), raw.open("r+b", buffering=0) as file:
        for number, size in enumerate((3 * CLUSTER + 513, CLUSTER + 1, 4095, 700, 6)):
            file.seek(0)
            file.write(secret)
            if number % 2:
                os.fsync(file.fileno())
            file.truncate(size)
            if not options:
                assert raw.stat().st_size == size
            assert raw.read_bytes()[:size] == secret[:size]
            file.truncate(SIZE)
            expected = secret[:size] + bytes(SIZE - size)
            assert raw.read_bytes() == expected
            os.fsync(file.fileno())
            assert raw.read_bytes() == expected
    assert qemu_bytes(image) == expected


@pytest.mark.parametrize("size", [6, 100_000, 2 * CLUSTER + 1])
def test_cut_and_end(image: Path, raw: Path, size: int) -> None:
    """The image ends in a whole sector, which ends in zeroes; what was in its last cluster is gone from the file."""
    with mounted(image, raw), raw.open("r+b", buffering=0) as file:
        file.write(b"SECRETSECRET" * 30_000)
        os.fsync(file.fileno())
        file.truncate(size)
    expected = (b"SECRETSECRET" * 30_000)[:size]
    assert qemu_bytes(image) == expected.ljust(-(-size // 512) * 512, b"\0")
    stored = image.read_bytes()
    assert stored.count(b"SECRETSECRET") <= size // 12 + 1
    check_is_clean(image)
    grown = subprocess.run(
        ["qemu-img", "resize", "-q", "-f", "qed", str(image), str(SIZE)], capture_output=True, text=True, check=False
    )
    if grown.returncode:  # a backing file that is longer; QEMU knows the danger
        assert "not support requested flags" in grown.stderr
        with mounted(image, raw):
            os.truncate(raw, SIZE)
    assert qemu_bytes(image) == expected.ljust(SIZE, b"\0")


def test_rewriting_in_place_with_something_shorter(image: Path, raw: Path) -> None:
    """As rsync --inplace does."""
    with mounted(image, raw):
        raw_bytes = b"old" * 100_000
        with raw.open("r+b") as file:
            file.write(raw_bytes)
        with raw.open("r+b") as file:
            file.write(b"new" * 1000)
            file.truncate()
        assert raw.read_bytes() == b"new" * 1000
    assert qemu_bytes(image) == (b"new" * 1000).ljust(3072, b"\0")


def test_inside_the_last_sector(image: Path, raw: Path) -> None:
    with mounted(image, raw):
        with raw.open("r+b", buffering=0) as file:
            file.seek(SIZE - 512)
            file.write(b"S" * 512)
            file.truncate(SIZE - 500)
            file.truncate(SIZE)
        assert raw.read_bytes()[-512:] == b"S" * 12 + bytes(500)
    assert qemu_bytes(image)[-512:] == b"S" * 12 + bytes(500)
    check_is_clean(image)


def test_a_mapped_page(image: Path, raw: Path) -> None:
    """What a mapping had changed behind the new end is not written any more."""
    with mounted(image, raw):
        with raw.open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 8192) as view:
            view[:4096] = b"S" * 4096
            file.truncate(6)
            file.truncate(SIZE)
            assert view[:4096] == b"S" * 6 + bytes(4090)
        assert raw.read_bytes()[:4096] == b"S" * 6 + bytes(4090)
    assert qemu_bytes(image)[:8192] == b"S" * 6 + bytes(8186)


def test_the_library(image: Path) -> None:
    async def cut(disk: Image, size: int) -> None:
        await disk.write(0, b"S" * 200_000)
        await disk.resize(size)
        assert disk.size == -(-size // 512) * 512
        assert await disk.read(0, SIZE) == (b"S" * size).ljust(disk.size, b"\0")
        await disk.resize(200_000)
        assert await disk.read(0, SIZE) == (b"S" * size).ljust(disk.size, b"\0")

    async def all_sizes() -> None:
        async with open_image(image) as disk:
            for size in (199_999, 199_683, 199_680, 131_073, 131_072, 65_000, 5, 0):
                await cut(disk, size)

    run(partial(all_sizes))
    check_is_clean(image)
