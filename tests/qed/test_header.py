"""header.py: both directions, every field's bounds, arbitrary bytes, and headers that QEMU wrote or reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.errors import CorruptError, FormatError, QedfuseError, UnsupportedError
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import (
    FEATURE_BACKING_FILE,
    FEATURE_BACKING_FORMAT_NO_PROBE,
    FEATURE_NEED_CHECK,
    HEADER_BYTES,
    Header,
)
from qedfuse.qed.new_image import new_header
from qedfuse.text import decode_backing_name

CLUSTER_SIZES = [1 << bits for bits in range(12, 27)]
TABLE_SIZES = [1, 2, 4, 8, 16]
MIB = 1 << 20

#: A plain image: 64 KiB clusters, tables of 4, header in the first cluster, L1 behind it.
PLAIN = Header(65536, 4, 1, 0, 0, 0, l1_table_offset=65536, image_size=64 * MIB)
BACKED = replace(PLAIN, features=FEATURE_BACKING_FILE, backing_filename_offset=64, backing_filename_size=8)

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img here (qemu-utils)")


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Any valid header."""
    geometry = Geometry(draw(st.sampled_from(CLUSTER_SIZES)), draw(st.sampled_from(TABLE_SIZES)))
    header_size = draw(st.integers(1, (1 << 32) // geometry.cluster_size))
    header_bytes = header_size * geometry.cluster_size
    name_size = draw(st.integers(1, min(4095, header_bytes - 64)))
    l1_cluster = draw(st.integers(header_size, (1 << 63) // geometry.cluster_size))
    return Header(
        cluster_size=geometry.cluster_size,
        table_size=geometry.table_size,
        header_size=header_size,
        features=draw(st.integers(0, 7)),
        compat_features=draw(st.integers(0, (1 << 64) - 1)),
        autoclear_features=draw(st.integers(0, (1 << 64) - 1)),
        l1_table_offset=l1_cluster * geometry.cluster_size,
        image_size=draw(st.integers(0, geometry.max_image_size // 512)) * 512,
        backing_filename_offset=draw(st.integers(64, min(header_bytes, 1 << 32) - name_size)),
        backing_filename_size=name_size,
    )


@given(headers(), st.binary(max_size=100))
def test_decode_inverts_encode(header: Header, what_follows: bytes) -> None:
    raw = header.encode()
    assert len(raw) == HEADER_BYTES
    assert Header.decode(raw + what_follows, "x.qed") == header


def test_layout_is_the_specifications() -> None:
    raw = (
        b"QED\0" b"\x00\x10\0\0" b"\x02\0\0\0" b"\x01\0\0\0"
        b"\x07\0\0\0\0\0\0\0" b"\x0a\0\0\0\0\0\0\0" b"\x0b\0\0\0\0\0\0\x80"
        b"\x00\x20\0\0\0\0\0\0" b"\x00\x06\0\0\0\0\0\0" b"\x40\0\0\0" b"\x05\0\0\0"
    )  # fmt: skip
    header = Header(4096, 2, 1, 7, 10, 0x800000000000000B, 8192, 1536, 64, 5)
    assert Header.decode(raw, "x.qed") == header
    assert header.encode() == raw


@pytest.mark.parametrize("table_size", TABLE_SIZES)
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_every_legal_geometry_up_to_its_largest_image(cluster_size: int, table_size: int) -> None:
    geometry = Geometry(cluster_size, table_size)
    largest = Header(cluster_size, table_size, 1, 0, 0, 0, cluster_size, geometry.max_image_size)
    assert Header.decode(largest.encode(), "x.qed").geometry == geometry
    with pytest.raises(FormatError, match="over this geometry"):
        Header.decode(replace(largest, image_size=geometry.max_image_size + 512).encode(), "x.qed")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"cluster_size": 0}, FormatError, "cluster size 0 is not"),
        ({"cluster_size": 2048}, FormatError, "cluster size 2048 is not"),
        ({"cluster_size": 65535}, FormatError, "cluster size 65535 is not"),
        ({"cluster_size": 128 * MIB}, FormatError, "cluster size 134217728 is not"),
        ({"table_size": 0}, FormatError, "table size 0 is not"),
        ({"table_size": 3}, FormatError, "table size 3 is not"),
        ({"table_size": 32}, FormatError, "table size 32 is not"),
        ({"header_size": 0}, FormatError, "header size 0 clusters is out of range"),
        ({"header_size": (1 << 32) - 1}, FormatError, "header size 4294967295 clusters is out of range"),
        ({"header_size": 2}, FormatError, "lies inside the header"),
        ({"features": 8}, UnsupportedError, "unsupported qed feature bits 0x8"),
        ({"features": 1 << 63 | 2}, UnsupportedError, "unsupported qed feature bits 0x8000000000000000"),
        ({"l1_table_offset": 0}, FormatError, "lies inside the header"),
        ({"l1_table_offset": 65536 + 4096}, FormatError, "is not cluster-aligned"),
        ({"l1_table_offset": (1 << 64) - 1}, FormatError, "is not cluster-aligned"),
        ({"image_size": 511}, FormatError, "is not a multiple of 512"),
        ({"image_size": (1 << 46) + 512}, FormatError, "is over this geometry's"),
        ({"image_size": (1 << 64) - 512}, FormatError, "is over this geometry's"),
    ],
)
def test_every_invalid_field_is_refused(fields: dict[str, int], error: type[QedfuseError], message: str) -> None:
    with pytest.raises(error) as caught:
        Header.decode(replace(PLAIN, **fields).encode(), "some/x.qed")
    assert str(caught.value).startswith("some/x.qed: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 8), (63, 8), (65536 - 7, 8), (65536, 1), (1 << 31, 8), ((1 << 32) - 1, (1 << 32) - 1), (64, 0), (64, 4096)],
)
def test_a_backing_name_outside_the_header_or_of_absurd_size_is_refused(offset: int, size: int) -> None:
    header = replace(BACKED, backing_filename_offset=offset, backing_filename_size=size)
    with pytest.raises(FormatError, match="the backing file's name"):
        Header.decode(header.encode(), "x.qed")
    without = replace(header, features=0)
    assert Header.decode(without.encode(), "x.qed") == without  # without the feature bit the fields mean nothing


@pytest.mark.parametrize(("offset", "size"), [(64, 1), (64, 4095), (65536 - 1, 1), (65536 - 4095, 4095)])
def test_a_backing_name_may_fill_the_header_to_its_edges(offset: int, size: int) -> None:
    header = replace(BACKED, backing_filename_offset=offset, backing_filename_size=size)
    assert Header.decode(header.encode(), "x.qed") == header


@pytest.mark.parametrize(("cluster_size", "room"), [(4096, 4032), (65536, 4095)])
@pytest.mark.parametrize("is_raw", [False, True])
def test_a_new_images_name_has_the_room_that_a_header_has(cluster_size: int, room: int, is_raw: bool) -> None:
    geometry = Geometry(cluster_size, 4)
    plain = new_header("x.qed", MIB, geometry)
    assert new_header("x.qed", MIB, geometry, b"n" * room, backing_is_raw=is_raw) == plain.with_backing_file(
        HEADER_BYTES, room, is_raw=is_raw
    )
    too_long = rf"^x\.qed: the backing file's name has {room + 1} bytes; the header has room for {room}$"
    with pytest.raises(QedfuseError, match=too_long):
        new_header("x.qed", MIB, geometry, b"n" * (room + 1))


def test_a_new_images_name_is_where_a_header_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Header, "room_for_name", lambda *_: 1000)
    assert new_header("x.qed", MIB, Geometry(), b"name").backing_filename_offset == 1000


@pytest.mark.parametrize("raw", [b"", b"QE", b"QFI\xfb" + bytes(60), b"qed\0" + bytes(60), bytes(64)])
def test_without_the_magic_it_is_no_qed_image(raw: bytes) -> None:
    with pytest.raises(FormatError, match=r"^x\.qed: not a qed image"):
        Header.decode(raw, "x.qed")


@given(st.integers(4, HEADER_BYTES - 1))
def test_a_short_header_is_refused(size: int) -> None:
    with pytest.raises(FormatError, match=f"cut off \\({size} of 64 bytes\\)"):
        Header.decode(PLAIN.encode()[:size], "x.qed")


def check_sound(found: Header, raw: bytes) -> None:
    assert found.encode() == raw[:HEADER_BYTES]
    assert found.image_size <= found.geometry.max_image_size
    assert found.header_bytes <= found.l1_table_offset
    if found.has_backing_file:
        assert found.backing_filename_offset >= 64
        assert found.backing_filename_offset + found.backing_filename_size <= found.header_bytes


@given(headers(), st.lists(st.tuples(st.integers(4, 63), st.integers(0, 255)), max_size=8), st.booleans(), st.binary())
def test_any_bytes_give_a_sound_header_or_one_plain_line(
    header: Header, changes: list[tuple[int, int]], backed: bool, noise: bytes
) -> None:
    raw = bytearray(header.with_feature(FEATURE_BACKING_FILE, backed).encode())
    for position, value in changes:
        raw[position] = value
    for candidate in (bytes(raw), b"QED\0" + noise):
        try:
            found = Header.decode(candidate, "x.qed")
        except QedfuseError as error:
            message = str(error)
        else:
            check_sound(found, candidate)
            continue
        assert message.startswith("x.qed: ")
        assert "\n" not in message


def test_the_l1_table_must_lie_inside_the_file() -> None:
    end = PLAIN.l1_table_offset + PLAIN.geometry.table_bytes
    for size in (end, end - 1, end - 511):  # QEMU counts in sectors
        PLAIN.validate_file_size(size, "x.qed")
    for size in (0, 64, end - 512):
        with pytest.raises(CorruptError, match=r"^x\.qed: the l1 table ends at"):
            PLAIN.validate_file_size(size, "x.qed")


@given(headers())
def test_changes_touch_their_field_alone(header: Header) -> None:
    dirty = header.with_feature(FEATURE_NEED_CHECK, True)
    assert dirty.needs_check
    clean = dirty.with_feature(FEATURE_NEED_CHECK, False)
    assert not clean.needs_check
    assert clean == replace(header, features=header.features & ~FEATURE_NEED_CHECK)
    assert header.with_image_size(512) == replace(header, image_size=512)
    assert header.with_known_autoclear() == replace(header, autoclear_features=0)


@given(st.binary(min_size=1, max_size=200))
def test_backing_name_keeps_every_byte_but_nul(raw: bytes) -> None:
    if b"\0" in raw:
        with pytest.raises(FormatError, match=r"^x\.qed: .* nul byte"):
            decode_backing_name(raw, "x.qed")
    else:
        assert decode_backing_name(raw, "x.qed").encode("utf-8", "surrogateescape") == raw


def qemu_info(path: Path) -> dict[str, Any]:
    result = subprocess.run(
        ["qemu-img", "info", "--output=json", os.fspath(path)], check=True, capture_output=True, timeout=60
    )
    info: dict[str, Any] = json.loads(result.stdout)
    return info


def qemu_create(path: Path, *arguments: str) -> None:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qed", *arguments[:-1], os.fspath(path), arguments[-1]],
        check=True,
        timeout=60,
    )


# Not 2 MiB with 16: what that geometry can map is 2**65 bytes, and QEMU's own limit wraps to 0.
@needs_qemu
@pytest.mark.parametrize(
    ("cluster_size", "table_size"),
    [(4096, 2), (4096, 4), (4096, 16), (65536, 2), (65536, 4), (65536, 16), (2 * MIB, 2), (2 * MIB, 4), (2 * MIB, 8)],
)
def test_qemus_header_says_what_qemu_img_info_says(tmp_path: Path, cluster_size: int, table_size: int) -> None:
    path = tmp_path / "x.qed"
    qemu_create(path, "-o", f"cluster_size={cluster_size},table_size={table_size}", str(777 * 512))
    raw = path.read_bytes()[:HEADER_BYTES]
    header = Header.decode(raw, str(path))
    info = qemu_info(path)
    assert info["format"] == "qed"
    assert (header.image_size, header.cluster_size) == (info["virtual-size"], info["cluster-size"])
    assert header.table_size == table_size
    assert header == Header(
        cluster_size, table_size, 1, 0, 0, 0, l1_table_offset=cluster_size, image_size=info["virtual-size"]
    )
    header.validate_file_size(path.stat().st_size, str(path))
    assert header.encode() == raw


@needs_qemu
@pytest.mark.parametrize("backing_format", ["raw", "qed", "qcow2"])
def test_qemus_backing_file(tmp_path: Path, backing_format: str) -> None:
    backing, path = tmp_path / "the base.img", tmp_path / "x.qed"
    subprocess.run(["qemu-img", "create", "-q", "-f", backing_format, backing, "1M"], check=True, timeout=60)
    qemu_create(path, "-b", backing.name, "-F", backing_format, "2M")
    raw = path.read_bytes()
    header = Header.decode(raw, str(path))
    name = raw[header.backing_filename_offset :][: header.backing_filename_size]
    assert header.has_backing_file
    assert header.backing_is_raw == (backing_format == "raw")
    assert decode_backing_name(name, str(path)) == qemu_info(path)["backing-filename"] == backing.name
    assert header.encode() == raw[:HEADER_BYTES]


@needs_qemu
def test_qemu_reads_our_header(tmp_path: Path) -> None:
    """And what QEMU does on a writable open is what the feature bits ask for."""
    path, name = tmp_path / "x.qed", b"base.raw"
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    header = replace(
        BACKED,
        features=FEATURE_BACKING_FILE | FEATURE_NEED_CHECK | FEATURE_BACKING_FORMAT_NO_PROBE,
        compat_features=1 << 40,
        autoclear_features=1 << 41,
    )
    path.write_bytes((header.encode() + name).ljust(header.l1_table_offset + header.geometry.table_bytes, b"\0"))
    info = qemu_info(path)
    assert info["virtual-size"] == header.image_size
    assert info["cluster-size"] == header.cluster_size
    assert info["backing-filename"] == "base.raw"
    assert info["backing-filename-format"] == "raw"
    subprocess.run(["qemu-io", "-f", "qed", "-c", "read 0 512", path], check=True, capture_output=True, timeout=60)
    after = Header.decode(path.read_bytes(), str(path))
    assert after == header.with_known_autoclear().with_feature(FEATURE_NEED_CHECK, False)
