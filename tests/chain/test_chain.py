"""Backing chains: formats, depth, loops and locks; QEMU reads the same bytes through them."""

from __future__ import annotations

import errno
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest

from qedfuse.chain.chain import MAX_DEPTH, open_backing, open_layer
from qedfuse.chain.format_probe import probe_format
from qedfuse.chain.policy import BackingPolicy
from qedfuse.errors import CorruptError, FormatError, InUseError, UnsupportedError
from qedfuse.host.file_storage import FileStorage
from tests.helpers.images.chains import (
    SIZE,
    contents,
    make_qed,
    make_raw,
    our_bytes,
    pattern,
    qemu_bytes,
    refusal,
    run,
)
from tests.helpers.judges.expect import raises_errno
from tests.helpers.qemu.cli import qemu_img, tool

NO_BACKING = BackingPolicy(allowed=False)


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["qed", "qcow2"])
def test_a_raw_disk_that_holds_an_image_stays_raw(tmp_path: Path, format: str) -> None:
    base = tmp_path / "base"
    qemu_img("create", "-q", "-f", format, base, SIZE)
    tool("qemu-io", "-f", format, "-c", "write -P 0x33 64k 64k", base)
    with base.open("ab") as file:
        file.truncate(-(-file.tell() // 512) * 512)
    raw, inner = base.read_bytes(), qemu_bytes(base, format)
    assert raw != inner

    marked = tmp_path / "marked.qed"
    qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "raw", marked)
    assert our_bytes(marked) == qemu_bytes(marked) == raw
    probed = tmp_path / "probed.qed"
    qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", format, probed)
    assert our_bytes(probed) == qemu_bytes(probed) == inner
    assert our_bytes(base, "raw") == raw
    assert our_bytes(base) == our_bytes(base, format) == inner


@pytest.mark.parametrize("format", ["vmdk", "vdi", "vhdx", "vpc", "parallels", "qcow"])
def test_formats_that_are_neither_read_nor_raw(tmp_path: Path, format: str) -> None:
    base = tmp_path / f"base.{format}"
    qemu_img("create", "-q", "-f", format, base, "8M")
    image = make_qed(tmp_path / "top.qed", base.name)
    error = refusal(image)
    assert f"{base}: looks like a {format}" in str(error)
    assert isinstance(error, UnsupportedError)
    make_qed(image, base.name, raw=True)
    assert our_bytes(image)[:512] == base.read_bytes()[:512]


def test_a_vmdk_descriptor(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", tmp_path / "base.vmdk", "1M")
    assert "looks like a vmdk" in str(refusal(make_qed(tmp_path / "top.qed", "base.vmdk")))


def test_probing() -> None:
    def probed(head: bytes) -> str:
        return probe_format(head, "disk")

    assert probed(b"QED\0") == "qed"  # then cut off, but not a raw disk
    assert probed(b"QFI\xfb\0\0\0\2") == probed(b"QFI\xfb\0\0\0\3") == probed(b"QFI\xfb\0\0\1\0") == "qcow2"
    for head in (b"", b"Q", b"QED", b"QED\1", b"QFI\xfb", b"QFI\xfb\0\0\0\0", bytes(512), b"\xff" * 512, b" QED\0"):
        assert probed(head) == "raw"
    for head in (
        b"Bochs Virtual HD Image\0",
        b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop\n",
        b"WithouFreSpacExt",
        b"COWD",
    ):
        with pytest.raises(UnsupportedError, match=r"^disk: looks like a"):
            probed(head)


def test_a_format_that_does_not_fit(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "disk.raw")
    for format, error in (("qed", FormatError), ("qcow2", FormatError), ("vmdk", UnsupportedError)):
        with pytest.raises(error, match=str(raw)):
            our_bytes(raw, format)


def test_a_mixed_chain(tmp_path: Path) -> None:
    """raw <- qcow2 <- qed <- qcow2 <- qed, a part written in each."""
    make_raw(tmp_path / "0.raw")
    below = "0.raw"
    for number, format in enumerate(("qcow2", "qed", "qcow2", "qed"), start=1):
        name, below_format = f"{number}.{format}", below.split(".")[1]
        qemu_img("create", "-q", "-f", format, "-b", below, "-F", below_format, tmp_path / name)
        tool("qemu-io", "-f", format, "-c", f"write -P {number} {number * 40}k 32k", tmp_path / name)
        below = name
        assert our_bytes(tmp_path / name) == qemu_bytes(tmp_path / name, format)


def test_the_format_that_qcow2_states(tmp_path: Path) -> None:
    top, base = tmp_path / "top.qcow2", tmp_path / "base"
    qemu_img("create", "-q", "-f", "qed", base, SIZE)
    for format in ("qed", "raw"):
        qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", format, top)
        assert our_bytes(top) == qemu_bytes(top, "qcow2")
    qemu_img("create", "-q", "-f", "vmdk", tmp_path / "base.vmdk", SIZE)
    qemu_img("create", "-q", "-f", "qcow2", "-b", tmp_path / "base.vmdk", "-F", "vmdk", top)
    assert f"{top}: says that its backing file {tmp_path}/base.vmdk is vmdk" in str(refusal(top))
    make_raw(base)
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", base, "-F", "qed", top, SIZE)
    assert str(refusal(top)).startswith(f"{base}: not a qed image")


# -- depth and loops --------------------------------------------------------------------------------------------------


def make_deep(directory: Path, images: int) -> Path:
    """A chain of `images` files, the last one raw."""
    make_raw(directory / "0.raw")
    below = "0.raw"
    for number in range(1, images):
        make_qed(directory / f"{number}.qed", below)
        below = f"{number}.qed"
    return directory / below


def test_a_chain_of_100_images(tmp_path: Path) -> None:
    top = make_deep(tmp_path, 100)
    assert our_bytes(top) == pattern(0xA5)
    assert qemu_bytes(top) == pattern(0xA5)


def test_the_longest_chain(tmp_path: Path) -> None:
    top = make_deep(tmp_path, MAX_DEPTH)
    assert our_bytes(top) == pattern(0xA5)
    longer = make_qed(tmp_path / "longer.qed", top.name)
    assert str(refusal(longer)) == f"{tmp_path}/1.qed: the chain of backing files has more than {MAX_DEPTH} images"


@pytest.mark.parametrize("images", [1, 2, 7])
@pytest.mark.parametrize("disguise", ["same name", "symbolic link", "hard link", "other path"])
def test_loops(tmp_path: Path, images: int, disguise: str) -> None:
    last = make_qed(tmp_path / "0.qed", "again.qed")
    if disguise == "same name":
        (tmp_path / "again.qed").symlink_to(f"{images - 1}.qed")
        make_qed(last, f"{images - 1}.qed")
    elif disguise == "other path":
        make_qed(last, f"../{tmp_path.name}/./{images - 1}.qed")
    for number in range(1, images):
        make_qed(tmp_path / f"{number}.qed", f"{number - 1}.qed")
    top = tmp_path / f"{images - 1}.qed"
    if disguise == "symbolic link":
        (tmp_path / "again.qed").symlink_to(top.name)
    elif disguise == "hard link":
        os.link(top, tmp_path / "again.qed")
    error = refusal(top)
    assert isinstance(error, CorruptError)
    assert error.errno == errno.ELOOP
    assert error.path == str(last)
    assert "is part of this chain already (a loop)" in str(error)


def test_a_loop_through_qcow2(tmp_path: Path) -> None:
    qcow2 = tmp_path / "a.qcow2"
    make_qed(tmp_path / "b.qed", "a.qcow2")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "b.qed", "-F", "qed", qcow2, SIZE)
    assert refusal(qcow2).errno == refusal(tmp_path / "b.qed").errno == errno.ELOOP


def test_open_backing(tmp_path: Path) -> None:
    """What an image will read, before it exists; it must not find itself."""
    make_raw(tmp_path / "base.raw")
    make_qed(tmp_path / "middle.qed", "base.raw")

    async def opened(image: str, name: str, policy: BackingPolicy) -> tuple[str, bytes]:
        layer = await open_backing(tmp_path / image, name, policy=policy)
        try:
            return layer.format, await contents(layer)
        finally:
            await layer.close()

    assert run(lambda: opened("new.qed", "middle.qed", BackingPolicy())) == ("qed", pattern(0xA5))
    assert run(lambda: opened("new.qed", "base.raw", BackingPolicy())) == ("raw", pattern(0xA5))
    with pytest.raises(UnsupportedError, match="--no-backing"):
        run(lambda: opened("new.qed", "base.raw", NO_BACKING))
    for name in ("middle.qed", "base.raw"):
        with pytest.raises(CorruptError, match="a loop"):
            run(partial(opened, name, "middle.qed", BackingPolicy()))


# -- locks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def closes_badly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is closed, and says EIO to it."""
    close = FileStorage.close

    async def fail(file: FileStorage) -> None:
        await close(file)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(FileStorage, "close", fail)


def _open_in(directory: Path) -> list[str]:
    names = map(os.path.realpath, Path("/proc/self/fd").iterdir())
    return [name for name in names if name.startswith(f"{directory}/")]


@pytest.mark.usefixtures("closes_badly")
def test_why_a_chain_cannot_be_opened_is_said_whatever_closing_says(tmp_path: Path) -> None:
    lowest = make_qed(tmp_path / "lowest.qed", "missing")
    middle = make_qed(tmp_path / "middle.qed", lowest.name)
    assert refusal(make_qed(tmp_path / "top.qed", middle.name)).errno == errno.ENOENT
    assert not _open_in(tmp_path)


@pytest.mark.usefixtures("closes_badly")
def test_a_chain_is_closed_to_its_end(tmp_path: Path) -> None:
    make_raw(tmp_path / "base")
    middle = make_qed(tmp_path / "middle.qed", "base")
    top = make_qed(tmp_path / "top.qed", middle.name)

    async def body() -> None:
        layer = await open_layer(top)
        assert len(_open_in(tmp_path)) == 3
        with raises_errno(errno.EIO):
            await layer.close()

    run(body)
    assert not _open_in(tmp_path)


def test_the_whole_chain_is_locked_for_reading(tmp_path: Path) -> None:
    base = make_raw(tmp_path / "base.raw")
    middle = make_qed(tmp_path / "middle.qed", "base.raw")
    top = make_qed(tmp_path / "top.qed", "middle.qed")

    def qemu_writes(path: Path, format: str) -> bool:
        command = ["qemu-io", "-f", format, "-c", "write 0 512", str(path)]
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0

    async def check(share: bool) -> list[bool]:
        layer = await open_layer(top, share=share)
        try:
            return [qemu_writes(base, "raw"), qemu_writes(middle, "qed"), qemu_writes(top, "qed")]
        finally:
            await layer.close()

    assert run(lambda: check(share=False)) == [False, False, False]
    assert run(lambda: check(share=True)) == [True, True, True]
    assert qemu_writes(base, "raw")


def test_a_backing_file_that_somebody_writes(tmp_path: Path) -> None:
    base = make_qed(tmp_path / "base.qed")
    top = make_qed(tmp_path / "top.qed", "base.qed")
    command = ["qemu-io", "-f", "qed", str(base)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(b"length\n")
        writer.stdin.flush()
        while not writer.stdout.readline().strip().endswith(b"KiB"):  # it has opened the image
            assert writer.poll() is None
        error = refusal(top)
        assert isinstance(error, InUseError)
        assert str(error).startswith(f"{base}: is in use by another process (qemu-io, pid {writer.pid})")
        assert our_bytes(top, share=True) == bytes(SIZE)
        writer.stdin.write(b"quit\n")
        writer.stdin.close()
        writer.wait(30)
    assert our_bytes(top) == bytes(SIZE)
