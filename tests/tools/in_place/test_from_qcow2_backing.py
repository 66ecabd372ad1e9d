"""qcow2 images with backing files become QED images where they are: names, formats, and whole chains."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from qedfuse.qed.header import FEATURE_BACKING_FORMAT_NO_PROBE, HEADER_BYTES, Header
from tests.helpers.images.qcow2_images import COMPATS, noise, poke, qemu_io
from tests.helpers.images.qcow2_in_place import convert, expect_conversion
from tests.helpers.qemu import cli
from tests.helpers.qemu.cli import qemu_img

MIB = 1 << 20


def name_in(image: Path) -> str:
    raw = image.read_bytes()[:65536]
    header = Header.decode(raw[:HEADER_BYTES], str(image))
    return os.fsdecode(raw[header.backing_filename_offset :][: header.backing_filename_size])


def overlay(image: Path, base: str, format: str | None, size: str = "5M", *options: str) -> Path:
    """An image over `base`, a name relative to the image, with data, zeroes, and clusters that are given back."""
    chosen = ["-F", format] if format else []
    more = [word for option in options for word in ("-o", option)]
    qemu_img("create", "-q", "-u", "-f", "qcow2", *more, "-b", base, *chosen, image, size)
    return image


def written(image: Path) -> Path:
    qemu_io(image, "write -P 1 100k 100k", "write -z 1M 512k", "write -P 2 3M 64k", "discard 2M 128k")
    return image


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("format", ["raw", "qcow2", "qed"])
def test_formats(tmp_path: Path, format: str, compat: str) -> None:
    """The disk is larger than what is below, and zeroes differ from what is not allocated."""
    base = tmp_path / "base"
    qemu_img("create", "-q", "-f", format, base, "3M")
    cli.qemu_io(base, "write -P 11 0 3M", format=format)
    image = written(overlay(tmp_path / "a.qcow2", "base", format, "5M", f"compat={compat}"))
    expect_conversion(image)
    header = Header.decode(image.read_bytes()[:HEADER_BYTES], "")
    assert bool(header.features & FEATURE_BACKING_FORMAT_NO_PROBE) == (format == "raw")
    assert header.backing_filename_offset == HEADER_BYTES
    assert name_in(image) == "base"


def test_a_raw_one_that_looks_like_an_image(tmp_path: Path) -> None:
    """It stays raw."""
    qemu_img("create", "-q", "-f", "qed", tmp_path / "base", "3M")
    image = overlay(tmp_path / "a.qcow2", "base", "raw", "1M")
    expect_conversion(image)
    qemu_img("convert", "-f", "qed", "-O", "raw", image, tmp_path / "flat")
    assert (tmp_path / "flat").read_bytes()[:4] == b"QED\0"


def test_format_not_said(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qed", tmp_path / "base", "3M")
    image = written(overlay(tmp_path / "a.qcow2", "base", "qed"))
    raw = image.read_bytes()
    poke(image, raw.index(struct.pack(">I", 0xE2792ACA)), struct.pack(">I", 0x12345678))
    expect_conversion(image)


@pytest.mark.parametrize("length", [447, 448, 449, 1000])
@pytest.mark.parametrize("cluster_size", ["4k", "64k"])
def test_long_names(tmp_path: Path, length: int, cluster_size: str) -> None:
    """Those that the first sector has no room for go behind all that qcow2 has in its first cluster."""
    name = ("d" * 199 + "/") * 4
    (tmp_path / name).mkdir(parents=True)
    name = "./" * ((length - 4) // 2) + "base"[: 4 + length % 2] if length < 600 else name + "b" * (length - len(name))
    name = name.ljust(length, "x")
    (tmp_path / name).write_bytes(noise(3 * MIB))
    image = written(overlay(tmp_path / "a.qcow2", name, "raw", "5M", f"cluster_size={cluster_size}"))
    expect_conversion(image)
    assert name_in(image) == name and len(name) == length


def test_name_that_is_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"b\xff\xfe")
    (tmp_path / name).write_bytes(noise(3 * MIB))
    image = written(overlay(tmp_path / "a.qcow2", name, "raw"))
    expect_conversion(image)
    assert name_in(image) == name


def test_chain(tmp_path: Path) -> None:
    """One layer after the other, from the top down, and what the top shows stays the same."""
    (tmp_path / "base.raw").write_bytes(noise(2 * MIB))
    below = [("base.raw", "raw"), ("one.qed", "qed"), ("two.qcow2", "qcow2"), ("top.qcow2", "qcow2")]
    for number, (name, format) in enumerate(below[1:]):
        base, base_format = below[number]
        qemu_img("create", "-q", "-f", format, "-b", base, "-F", base_format, name, "3M", cwd=tmp_path)
        cli.qemu_io(tmp_path / name, f"write -P {number} {number * 300}k 500k", format=format)
    flat, top = tmp_path / "flat.raw", tmp_path / "top.qcow2"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", top, flat)
    for name in ("top.qcow2", "two.qcow2"):
        expect_conversion(tmp_path / name)
        qemu_img("compare", "-q", "-f", "raw", "-F", "qed", flat, top)


def test_backing_file_that_is_missing(tmp_path: Path) -> None:
    """It is not looked at."""
    image = overlay(tmp_path / "a.qcow2", "missing", "raw")
    convert(image)
    assert name_in(image) == "missing"
