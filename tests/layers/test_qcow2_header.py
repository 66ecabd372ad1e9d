"""qcow2 headers: what is read of them, and what is refused: images by qemu-img where it can make them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qedfuse.errors import CorruptError, FormatError, QedfuseError, UnsupportedError
from qedfuse.text import describe
from tests.helpers.images.qcow2_images import COMPATS, be64, create, header_of, poke, qemu_io, qemu_refuses, same
from tests.helpers.qemu.cli import qemu_img


class TestHeader:
    def test_backing_name(self, tmp_path: Path) -> None:
        base = create(tmp_path / "base.qcow2", 1 << 20)
        for compat in COMPATS:
            top = create(tmp_path / "t.qcow2", 1 << 20, f"compat={compat}", backing=base, backing_format="qcow2")
            header = header_of(top)
            assert (header.backing_name, header.backing_format) == (str(base), "qcow2")
            qemu_img("rebase", "-u", "-f", "qcow2", "-b", "rel.img", "-F", "raw", top)
            header = header_of(top)
            assert (header.backing_name, header.backing_format) == ("rel.img", "raw")
            assert header.version == (2 if compat == "0.10" else 3)
        assert header_of(base).backing_name is None and header_of(base).backing_format is None

    def test_without_backing_format(self, tmp_path: Path) -> None:
        """Images of old programs do not say the format."""
        top = create(tmp_path / "t.qcow2", 1 << 20, backing=create(tmp_path / "base.qcow2", 1 << 20))
        data = top.read_bytes()
        at = data.index(struct.pack(">I", 0xE2792ACA))
        poke(top, at, struct.pack(">I", 0x12345678))  # an unknown extension is skipped
        header = header_of(top)
        assert header.backing_format is None and header.backing_name == str(tmp_path / "base.qcow2")

    def test_virtual_size_in_mid_sector(self, tmp_path: Path) -> None:
        """QEMU cannot make such a size, and rounds it down when it finds one."""
        image = create(tmp_path / "a.qcow2", 1 << 20)
        qemu_io(image, "write -P 1 0 1M")
        poke(image, 24, struct.pack(">Q", 1000001))
        same(image)
        assert header_of(image).size == 999936

    def test_empty_disk(self, tmp_path: Path) -> None:
        same(create(tmp_path / "a.qcow2", 0))

    def test_dirty_is_fine(self, tmp_path: Path) -> None:
        image = create(tmp_path / "a.qcow2", 1 << 20)
        qemu_io(image, "write -P 1 0 64k")
        poke(image, 72, struct.pack(">Q", 1))
        same(image)

    def test_name_at_the_end_of_the_cluster(self, tmp_path: Path) -> None:
        """QEMU puts the name behind the extensions; the format allows it anywhere in the first cluster."""
        top = create(tmp_path / "t.qcow2", 1 << 20, backing=create(tmp_path / "base.qcow2", 1 << 20))
        poke(top, 65536 - 7, b"moved.q")
        poke(top, 8, struct.pack(">QI", 65536 - 7, 7))
        assert header_of(top).backing_name == "moved.q"
        assert "backing file: moved.q " in qemu_img("info", top)

    @pytest.mark.parametrize("size", [0, 3, 8, 71, 72, 103, 104, 200])
    def test_cut_off(self, tmp_path: Path, size: int) -> None:
        image = create(tmp_path / "a.qcow2", 1 << 20)
        with image.open("r+b") as file:
            file.truncate(size)
        refusal(image, FormatError if size < 104 else CorruptError)

    def test_other_formats(self, tmp_path: Path) -> None:
        for content in (b"QFI", bytes(4096), b"QED\0" + bytes(100)):
            path = tmp_path / "x"
            path.write_bytes(content)
            assert "not a qcow2 image" in refusal(path, FormatError)


def refusal(image: Path, kind: type[QedfuseError]) -> str:
    with pytest.raises(QedfuseError) as caught:
        header_of(image)
    assert type(caught.value) is kind, caught.value
    assert caught.value.path == str(image)
    line = describe(caught.value)
    assert "\n" not in line
    return line


class TestRefusals:
    def test_luks(self, tmp_path: Path) -> None:
        image = tmp_path / "a.qcow2"
        secret = ["--object", "secret,id=s,data=geheim"]
        options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
        for attempt in range(20):
            try:
                qemu_img("create", "-q", "-f", "qcow2", *secret, "-o", options, image, "1M")
                break
            except AssertionError as error:
                # qemu-img times its key derivation and gives up, now and then, where the CPU clock is coarse
                if attempt == 19 or "accurate CPU usage" not in str(error):
                    raise
        assert "encrypted (luks)" in refusal(image, UnsupportedError)

    def test_aes(self, tmp_path: Path) -> None:
        image = tmp_path / "a.qcow2"
        secret = ["--object", "secret,id=s,data=geheim"]
        qemu_img("create", "-q", "-f", "qcow2", *secret, "-o", "encrypt.format=aes,encrypt.key-secret=s", image, "1M")
        assert "encrypted (aes)" in refusal(image, UnsupportedError)

    def test_data_file(self, tmp_path: Path) -> None:
        image = create(tmp_path / "a.qcow2", 1 << 20, f"data_file={tmp_path / 'data.raw'}")
        assert "external data file" in refusal(image, UnsupportedError)

    def test_zstd(self, tmp_path: Path) -> None:
        image = create(tmp_path / "a.qcow2", 1 << 20, "compression_type=zstd")
        assert "compression type zstd" in refusal(image, UnsupportedError)

    def test_extended_l2(self, tmp_path: Path) -> None:
        image = create(tmp_path / "a.qcow2", 1 << 20, "extended_l2=on")
        assert "extended l2" in refusal(image, UnsupportedError)

    def test_unknown_feature(self, tmp_path: Path) -> None:
        image = create(tmp_path / "a.qcow2", 1 << 20)
        for bit in (5, 6, 40, 63):
            poke(image, 72, struct.pack(">Q", 1 << bit))
            assert f"{1 << bit:#x}" in refusal(image, UnsupportedError)
        poke(image, 72, bytes(8) + b"\xff" * 16)  # compatible and autoclear: any bits will do
        header_of(image)

    def test_corrupt_bit(self, tmp_path: Path) -> None:
        image = create(tmp_path / "a.qcow2", 1 << 20)
        poke(image, 72, struct.pack(">Q", 2))
        assert "qemu-img check -r all" in refusal(image, CorruptError)

    @pytest.mark.parametrize(
        ("offset", "value", "kind", "words"),
        [
            (4, ">I1", UnsupportedError, "version 1"),
            (4, ">I4", UnsupportedError, "version 4"),
            (20, ">I8", FormatError, "cluster bits 8"),
            (20, ">I22", FormatError, "cluster bits 22"),
            (20, ">I4294967295", FormatError, "cluster bits"),
            (24, ">Q18446744073709551615", FormatError, "too large"),
            (24, ">Q4611686018427387904", FormatError, "l1 table has"),
            (32, ">I3", UnsupportedError, "method 3"),
            (36, ">I0", FormatError, "l1 table has 0 entries"),
            (40, ">Q513", FormatError, "cluster-aligned"),
            (40, ">Q1152921504606846976", CorruptError, "past the end of the file"),
            (8, ">Q65537", FormatError, "lies outside"),
            (8, ">Q18446744073709551615", FormatError, "lies outside"),
            (16, ">I1024", FormatError, "1024 bytes"),
            (100, ">I72", FormatError, "header length 72"),
            (100, ">I65537", FormatError, "header length"),
            (104, ">B1", FormatError, "compression type 1 without"),
            (116, ">I16", FormatError, "backing format has 16 bytes"),
            (116, ">I4294967295", FormatError, "too large"),
        ],
    )
    def test_field(self, tmp_path: Path, offset: int, value: str, kind: type[QedfuseError], words: str) -> None:
        base = tmp_path / "base.raw"
        base.write_bytes(bytes(1 << 20))
        image = create(tmp_path / "a.qcow2", 1 << 20, backing=base)
        assert be64(image, 112) >> 32 == 0xE2792ACA
        poke(image, offset, struct.pack(value[:2], int(value[2:])))
        assert words in refusal(image, kind)
        if words != "past the end of the file":  # QEMU reads zeroes there
            assert qemu_refuses(image)
