"""qcow2 images that cannot become QED images where they are: one line says why, and the file is as before."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qedfuse.chain.unfinished import SUFFIX
from qedfuse.errors import QedfuseError
from qedfuse.text import describe
from qedfuse.tools.in_place.plan import Wanted
from tests.helpers.images.qcow2_images import be64, create, l1_offset, l2_offset, poke, qemu_io
from tests.helpers.images.qcow2_in_place import DEFAULT, convert
from tests.helpers.qemu.cli import qemu_img

MIB = 1 << 20
Damage = Callable[[Path], None]


def expect_refusal(image: Path, words: str, wanted: Wanted = DEFAULT) -> None:
    before, times = image.read_bytes(), os.stat(image).st_mtime_ns
    with pytest.raises(QedfuseError) as caught:
        convert(image, wanted)
    line = describe(caught.value)
    assert words in line and line.endswith(f"; {image} is unchanged") and line.count("\n") == 0
    assert image.read_bytes() == before and os.stat(image).st_mtime_ns == times
    assert not Path(f"{image}{SUFFIX}").exists()


def ordinary(path: Path, *options: str) -> Path:
    image = create(path, 4 * MIB, *options)
    qemu_io(image, "write -P 1 0 128k", "write -c -P 2 192k 64k", "write -z 1M 64k")
    return image


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["cluster_size=512"], "its clusters of 512 bytes are below qed's 4096; qedfuse convert"),
        (["cluster_size=2k"], "clusters of 2048 bytes"),
        (["extended_l2=on", "cluster_size=64k"], "extended l2 entries"),
        (["data_file=data", "data_file_raw=off"], "external data file"),
        (["compression_type=zstd"], "compression type zstd"),
    ],
)
def test_options(tmp_path: Path, options: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expect_refusal(create(tmp_path / "a.qcow2", 4 * MIB, *options), words)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_encryption(tmp_path: Path, compat: str) -> None:
    image = tmp_path / "a.qcow2"
    secret = ["--object", "secret,id=key,data=password"]
    encryption = f"encrypt.format=aes,encrypt.key-secret=key,compat={compat}"
    qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", encryption, image, "1M")
    expect_refusal(image, "encrypted (aes)")
    poke(image, 32, struct.pack(">I", 2))  # QEMU makes none while the machine is busy: it measures its key's strength
    expect_refusal(image, "encrypted (luks)")


def test_snapshots(tmp_path: Path) -> None:
    image = ordinary(tmp_path / "a.qcow2")
    qemu_img("snapshot", "-c", "one", image)
    expect_refusal(image, "has internal snapshots (1)")


def test_snapshot_that_the_header_forgot(tmp_path: Path) -> None:
    """Its clusters are shared all the same."""
    image = ordinary(tmp_path / "a.qcow2")
    qemu_img("snapshot", "-c", "one", image)
    poke(image, 60, bytes(4))
    expect_refusal(image, "has a reference count of 2")


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32, 64])
def test_reference_count_above_one(tmp_path: Path, bits: int) -> None:
    """Of the last cluster that has one."""
    image = create(tmp_path / "a.qcow2", 4 * MIB, f"refcount_bits={bits}")
    qemu_io(image, "write -P 1 0 128k")
    block = be64(image, be64(image, 48))
    cluster = image.stat().st_size // 65536 - 1
    if bits < 8:
        poke(image, block + cluster * bits // 8, bytes([2 << cluster * bits % 8]))
    else:
        poke(image, block + cluster * bits // 8, (2).to_bytes(bits // 8, "big"))
    expect_refusal(image, f"the cluster at {cluster << 16:#x} has a reference count of 2")


@pytest.mark.parametrize(
    ("bit", "words"),
    [(0, "was not closed cleanly"), (1, "marked as corrupt"), (9, "unsupported qcow2 feature bits 0x200")],
)
def test_incompatible_bits(tmp_path: Path, bit: int, words: str) -> None:
    image = ordinary(tmp_path / "a.qcow2")
    poke(image, 72, struct.pack(">Q", 1 << bit))
    expect_refusal(image, words)


def test_geometry(tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", 17 << 30, "cluster_size=4k")
    expect_refusal(image, "all that cluster_size=4096,table_size=4 can map", Wanted(table_size=4))
    expect_refusal(image, "cluster_size can only be 4096", Wanted(cluster_size=65536))
    image = create(tmp_path / "b.qcow2", 257 << 30, "cluster_size=4k")
    expect_refusal(image, "cluster_size=4096,table_size=16 can map; qedfuse convert")


def test_formats_that_qed_cannot_say(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "base.vmdk", "-F", "vmdk", image, "1M")
    expect_refusal(image, "backing file's format is vmdk")


def test_name_that_has_no_room(tmp_path: Path) -> None:
    """The whole first cluster is header extensions and the name."""
    image = create(tmp_path / "a.qcow2", MIB, "cluster_size=4k")
    name = "n" * 1000
    start = struct.unpack(">I", image.read_bytes()[100:104])[0]
    poke(image, start, struct.pack(">II", 0x12345678, 4096 - start - 8 - len(name)))
    poke(image, 4096 - len(name), name.encode())
    poke(image, 8, struct.pack(">QI", 4096 - len(name), len(name)))
    expect_refusal(image, "no room for the backing file's name, 1000 bytes")


def l1_far_away(image: Path) -> None:
    poke(image, 40, struct.pack(">Q", 1 << 40))


def l1_is_header(image: Path) -> None:
    poke(image, 40, bytes(8))


def l2_far_away(image: Path) -> None:
    poke(image, l1_offset(image), struct.pack(">Q", 1 << 40))


def l2_misaligned(image: Path) -> None:
    poke(image, l1_offset(image), struct.pack(">Q", l2_offset(image) + 512))


def l2_is_l1(image: Path) -> None:
    poke(image, l1_offset(image), struct.pack(">Q", l1_offset(image)))


def data_far_away(image: Path) -> None:
    poke(image, l2_offset(image), struct.pack(">Q", 1 << 40))


def data_misaligned(image: Path) -> None:
    poke(image, l2_offset(image) + 8, struct.pack(">Q", be64(image, l2_offset(image)) + 512))


def data_twice(image: Path) -> None:
    poke(image, l2_offset(image) + 40, struct.pack(">Q", be64(image, l2_offset(image))))


def compressed_is_header(image: Path) -> None:
    poke(image, l2_offset(image), struct.pack(">Q", 1 << 62 | 64))


def data_is_table(image: Path) -> None:
    poke(image, l2_offset(image), struct.pack(">Q", l2_offset(image)))


def data_is_refcounts(image: Path) -> None:
    poke(image, l2_offset(image), struct.pack(">Q", be64(image, be64(image, 48))))


def compressed_is_data(image: Path) -> None:
    poke(image, l2_offset(image) + 24, struct.pack(">Q", 1 << 62 | be64(image, l2_offset(image)) & (1 << 55) - 1))


def compressed_far_away(image: Path) -> None:
    poke(image, l2_offset(image) + 24, struct.pack(">Q", 1 << 62 | 1 << 40))


def broken_stream(image: Path) -> None:
    poke(image, be64(image, l2_offset(image) + 24) & (1 << 54) - 1, b"\xff" * 60)


def cut_in_a_stream(image: Path) -> None:
    """The last one of the file: what it lacks is not zeroes."""
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - 1)


def refcounts_far_away(image: Path) -> None:
    poke(image, 48, struct.pack(">Q", 1 << 40))


def refcount_block_far_away(image: Path) -> None:
    poke(image, be64(image, 48), struct.pack(">Q", 1 << 40))


def refcount_blocks_are_one(image: Path) -> None:
    poke(image, be64(image, 48) + 8, struct.pack(">Q", be64(image, be64(image, 48))))


def no_refcounts(image: Path) -> None:
    poke(image, 56, bytes(4))


def refcounts_of_128_bits(image: Path) -> None:
    poke(image, 96, struct.pack(">I", 7))


def cut_in_data(image: Path) -> None:
    with image.open("r+b") as file:
        file.truncate(be64(image, l2_offset(image)) & (1 << 56) - 512)


def cut_in_a_table(image: Path) -> None:
    with image.open("r+b") as file:
        file.truncate(l2_offset(image) + 8)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (l1_far_away, "past the end of the file"),
        (l1_is_header, "the l1 table (0x0) lies in the header"),
        (l2_far_away, "an l2 table (0x10000000000) lies outside the file"),
        (l2_misaligned, "is not cluster-aligned"),
        (l2_is_l1, "is used for something else, too"),
        (data_far_away, "the data cluster of guest offset 0 (0x10000000000) lies outside the file"),
        (data_misaligned, "the data cluster of guest offset 65536"),
        (data_twice, "is used for something else, too"),
        (compressed_is_header, "lies in the header"),
        (data_is_table, "is used for something else, too"),
        (data_is_refcounts, "is used for something else, too"),
        (compressed_is_data, "the compressed cluster of guest offset 196608"),
        (compressed_far_away, "outside the file"),
        (broken_stream, "cannot be decompressed"),
        (cut_in_a_stream, "cannot be decompressed"),
        (refcounts_far_away, "the table of reference counts (0x10000000000) lies outside the file"),
        (refcount_block_far_away, "a block of reference counts (0x10000000000)"),
        (refcount_blocks_are_one, "is used for something else, too"),
        (no_refcounts, "has no reference counts"),
        (refcounts_of_128_bits, "the width of its reference counts"),
        (cut_in_data, "lies outside the file"),
        (cut_in_a_table, "lies outside the file"),
    ],
)
def test_damage(tmp_path: Path, damage: Damage, words: str) -> None:
    image = ordinary(tmp_path / "a.qcow2")
    damage(image)
    if damage in (broken_stream, cut_in_a_stream):  # known when something has been written, and taken back
        before = image.read_bytes()
        with pytest.raises(QedfuseError, match=rf"{words}.*; {image} is unchanged"):
            convert(image)
        assert image.read_bytes() == before and not Path(f"{image}{SUFFIX}").exists()
    else:
        expect_refusal(image, words)
