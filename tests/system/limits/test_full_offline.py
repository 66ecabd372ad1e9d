"""No space for a rebase or a commit: one line says so, the image reads as before, and with room it works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.images.conversions import MIB, flat, qemu_finds_no_error
from tests.helpers.mounts.guests import filesystem, loop_device, need_guest, qemu_check, run
from tests.helpers.qemu.cli import new_image, one_line, qedfuse, qemu_img

HOST = 12 * MIB


@pytest.fixture(params=["ext4", "tmpfs"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system."""
    need_guest("mkfs.ext4")
    if request.param == "tmpfs":
        with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs", "-o", f"size={HOST}") as point:
            yield point
        return
    disk = tmp_path / "host.raw"
    with disk.open("wb") as file:
        file.truncate(HOST)
    run("mkfs.ext4", "-q", "-m", "0", disk)
    with loop_device(disk) as loop, filesystem(loop, tmp_path / "host") as point:
        yield point


@pytest.mark.guest
@pytest.mark.parametrize("overlay", [False, True])
def test_rebase(host: Path, tmp_path: Path, overlay: bool) -> None:
    """`overlay`: onto another file; else to stand alone."""
    (tmp_path / "old.raw").write_bytes(b"o" * 20 * MIB)
    (tmp_path / "new.raw").write_bytes(b"n" * 10 * MIB)
    options = ("-o", "cluster_size=4k,table_size=2")
    image = new_image(host / "image.qed", "24M", *options, "-b", tmp_path / "old.raw", "-F", "raw")
    before = flat_of(image, tmp_path)
    command = ("rebase", "-b", tmp_path / "new.raw" if overlay else "", image)
    for _ in range(2):
        one_line(qedfuse(*command), 1, "image.qed: no space left on device", f"`qedfuse compact {image}` gives back")
        assert qemu_check(image).get("corruptions", 0) == 0
        assert flat_of(image, tmp_path) == before
    full = image.stat().st_blocks
    assert qedfuse("compact", image).code == 0
    assert image.stat().st_blocks < full / 2 and flat_of(image, tmp_path) == before
    moved = tmp_path / "moved.qed"
    run("cp", "--sparse=always", image, moved)
    assert qedfuse(*command[:-1], moved).code == 0
    assert flat(moved).read_bytes() == before


@pytest.mark.guest
@pytest.mark.parametrize("format", ["raw", "qed"])
def test_commit(host: Path, tmp_path: Path, format: str) -> None:
    base = host / f"base.{format}"
    qemu_img("create", "-q", "-f", format, base, "4M")
    image = new_image(tmp_path / "image.qed", "24M", "-b", base, "-F", format)
    (tmp_path / "data.raw").write_bytes(b"d" * 16 * MIB)
    qemu_img("convert", "-n", "-f", "raw", "-O", "qed", tmp_path / "data.raw", "--target-is-zero", image)
    before = flat(image).read_bytes()
    for _ in range(2):
        said = qedfuse("commit", image)
        one_line(said, 1, f"base.{format}: no space left on device", f"{image} reads as before")
        assert (f"`qedfuse compact {base}`" in said.err) is (format == "qed")
        qemu_finds_no_error(image)
        assert flat(image).read_bytes() == before
        if format == "qed":
            assert qemu_check(base).get("corruptions", 0) == 0
    moved = tmp_path / f"moved.{format}"
    run("cp", "--sparse=always", base, moved)
    qemu_img("rebase", "-u", "-b", moved, "-F", format, image)
    assert qedfuse("commit", image).code == 0
    assert flat(image).read_bytes() == before
    assert flat(moved).read_bytes() == before


def flat_of(image: Path, directory: Path) -> bytes:
    """What QEMU reads, by way of another file system."""
    path = directory / "image.flat"
    qemu_img("convert", "-f", "qed", "-O", "raw", image, path)
    return path.read_bytes()
