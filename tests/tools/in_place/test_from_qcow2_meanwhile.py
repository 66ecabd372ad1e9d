"""A conversion from qcow2 that is interrupted, and QEMU writes to the image before it is finished or taken back: what
QEMU puts behind the old end is not cut off.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import trio

from qedfuse.chain.unfinished import SUFFIX
from qedfuse.errors import QedfuseError
from qedfuse.host.storage import Storage
from qedfuse.progress import Report
from qedfuse.tools.in_place.apply import InPlace
from qedfuse.tools.in_place.convert import FileConversion
from qedfuse.tools.in_place.qcow2_tail import Tail
from qedfuse.tools.in_place.qcow2_to_qed import Qcow2ToQedConversion
from tests.helpers.images.qcow2_images import create, poke, qemu_io
from tests.helpers.images.qcow2_in_place import DEFAULT, convert, expect_qed
from tests.helpers.judges.in_place import silent
from tests.helpers.qemu.cli import qemu_img

MIB = 1 << 20


class Interruption(Exception):
    """The process has ended."""


def interrupted(image: Path, monkeypatch: pytest.MonkeyPatch, *, after: bool = True) -> int:
    """Leave a conversion as SIGKILL would, `after` the tail was written or before. Returns the old size."""
    size = image.stat().st_size
    write = Tail.write

    async def interrupt(self: Tail, storage: Storage, progress: Report) -> bytes:
        if after:
            await write(self, storage, progress)
        raise Interruption

    async def nothing(_self: InPlace, _conversion: object) -> None:
        await trio.lowlevel.checkpoint()

    with monkeypatch.context() as patched:
        patched.setattr(Tail, "write", interrupt)
        patched.setattr(InPlace, "_retreat", nothing)
        with pytest.raises(Interruption):
            convert(image)
    assert image.stat().st_size > size and Path(f"{image}{SUFFIX}").exists()
    return size


def copy_of(image: Path) -> Path:
    return Path(shutil.copyfile(image, image.with_name("before.qcow2")))


def take_back(image: Path) -> None:
    trio.run(FileConversion(str(image), source="qcow2", target="qed").take_back)
    assert not Path(f"{image}{SUFFIX}").exists()


def expect_qcow2(image: Path, before: Path) -> None:
    qemu_img("check", "-q", "-f", "qcow2", image)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "qcow2", before, image)


def ordinary(path: Path, *options: str) -> Path:
    image = create(path, 8 * MIB, *options)
    qemu_io(image, "write -P 1 0 128k", "write -c -P 2 192k 64k", "write -z 1M 64k")
    return image


@pytest.mark.parametrize("after", [True, False])
def test_nothing_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    image = ordinary(tmp_path / "a.qcow2")
    before = image.read_bytes()
    interrupted(image, monkeypatch, after=after)
    take_back(image)
    assert image.read_bytes() == before


@pytest.mark.parametrize("undone", [True, False])
@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=64k", "refcount_bits=1"])
def test_clusters_in_the_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, undone: bool) -> None:
    image = ordinary(tmp_path / "a.qcow2", options)
    size = interrupted(image, monkeypatch)
    qemu_io(image, "write -P 7 64k 1M", "write -P 8 5M 700k")
    before = copy_of(image)
    if undone:
        take_back(image)
        expect_qcow2(image, before)
        assert image.stat().st_size > size
    else:
        convert(image)
        expect_qed(image, before)


def test_a_cluster_that_the_end_of_the_file_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, but behind the old end."""
    image = create(tmp_path / "a.qcow2", MIB)
    qemu_io(image, "write -P 1 0 128k")
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - 5000)
    interrupted(image, monkeypatch)
    qemu_io(image, f"write -P 9 {(128 << 10) - 1024} 512")
    before = copy_of(image)
    take_back(image)
    expect_qcow2(image, before)


def test_a_dirty_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reference counts may be stale: nothing is cut off, and it must be repaired before it is converted."""
    image = ordinary(tmp_path / "a.qcow2", "lazy_refcounts=on")
    interrupted(image, monkeypatch)
    words = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 1M", "-c", "flush", "-c", "sigraise 9", str(image)]
    subprocess.run(words, check=False, capture_output=True, timeout=60)
    before = copy_of(image)
    with pytest.raises(QedfuseError, match=rf"was not closed cleanly.*{image} is unchanged"):
        convert(image)
    assert image.read_bytes() == before.read_bytes()
    qemu_img("check", "-q", "-r", "all", "-f", "qcow2", image)
    convert(image)
    expect_qed(image, before)


def test_another_program_made_it_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = ordinary(tmp_path / "a.qcow2")
    interrupted(image, monkeypatch)
    poke(image, 0, b"QFI\0")
    before = image.read_bytes()
    with pytest.raises(QedfuseError, match="not a qcow2 image"):
        take_back(image)
    with pytest.raises(QedfuseError, match="not a qcow2 image"):
        trio.run(FileConversion(str(image), source="qcow2", target="qed").run, DEFAULT, silent)
    assert image.read_bytes() == before


async def interrupt(_self: object, _storage: Storage, _progress: Report) -> None:
    raise Interruption


def switched(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a conversion as SIGKILL would, before it gives anything back."""
    with monkeypatch.context() as patched:
        patched.setattr(Qcow2ToQedConversion, "finish", interrupt)
        with pytest.raises(Interruption):
            convert(image)
    assert image.read_bytes()[:4] == b"QED\0" and Path(f"{image}{SUFFIX}").exists()


def test_the_new_image_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU writes to it, and does not even close it; then the conversion is finished."""
    image = ordinary(tmp_path / "a.qcow2")
    switched(image, monkeypatch)
    words = ["qemu-io", "-f", "qed", "-c", "write -P 7 64k 1M", "-c", "flush", "-c", "sigraise 9", str(image)]
    subprocess.run(words, check=False, capture_output=True, timeout=60)
    flat = tmp_path / "flat"
    qemu_img("convert", "-f", "qed", "-O", "raw", image, flat)
    convert(image)
    assert not Path(f"{image}{SUFFIX}").exists()
    qemu_img("check", "-q", "-f", "qed", image)
    qemu_img("compare", "-q", "-f", "raw", "-F", "qed", flat, image)


@pytest.mark.parametrize("other", ["qcow2", "qed", "raw"])
def test_the_new_image_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    """It is left alone, though what nothing refers to in it would be given back."""
    image = ordinary(tmp_path / "a.qcow2")
    switched(image, monkeypatch)
    options = {"qcow2": [], "qed": ["-o", "table_size=2"], "raw": []}
    qemu_img("create", "-q", "-f", other, *options[other], image, MIB)
    before = image.read_bytes()
    with pytest.raises(QedfuseError, match="another program has changed the file since then"):
        convert(image)
    assert image.read_bytes() == before
