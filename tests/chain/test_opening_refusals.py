"""`open_image` on images that were not closed cleanly, that are broken, and that it must refuse."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
from pathlib import Path

import pytest

from qedfuse.chain import recovery
from qedfuse.chain.opening import open_image
from qedfuse.chain.policy import BackingPolicy
from qedfuse.check.check import Repair
from qedfuse.check.result import CheckResult
from qedfuse.errors import CorruptError, FormatError, UnsupportedError
from qedfuse.host.storage import Storage
from qedfuse.qed.header import HEADER_BYTES, Header
from qedfuse.text import describe
from tests.helpers.images.chains import (
    SIZE,
    check_is_clean,
    header_of,
    make_qed,
    make_raw,
    qemu_bytes,
    qemu_writes,
    run,
)


@pytest.fixture
def unclean(image: Path) -> Path:
    """As a QEMU leaves it that dies while it allocates."""
    command = ["qemu-io", "-f", "qed", "-c", "write -P 0x77 0 64k", "-c", "sigraise 9", str(image)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert header_of(image).needs_check
    return image


# -- unclean images ---------------------------------------------------------------------------------------------------


def test_an_unclean_image_is_repaired_when_it_is_opened_for_writing(
    unclean: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def write() -> None:
        async with open_image(unclean) as disk:
            assert not header_of(unclean).needs_check
            await disk.write(SIZE - 512, b"\1" * 512)

    with caplog.at_level(logging.WARNING, "qedfuse"):
        run(write)
    assert caplog.messages[0] == f"{unclean}: was not closed cleanly; checking it"
    assert not header_of(unclean).needs_check
    check_is_clean(unclean)
    assert qemu_bytes(unclean)[-512:] == b"\1" * 512


def test_an_unclean_image_is_left_alone_when_it_is_read(unclean: Path) -> None:
    before = unclean.read_bytes()

    async def read() -> bytes:
        async with open_image(unclean, read_only=True) as disk:
            return bytes(await disk.read(0, SIZE))

    ours = run(read)
    assert unclean.read_bytes() == before
    assert ours == qemu_bytes(unclean)
    assert unclean.read_bytes() == before


def test_an_unclean_image_that_is_cut(unclean: Path) -> None:
    """What points behind the end of the file goes. What the end cuts off keeps what is there: here a table lacks a
    quarter, and then all of it."""

    async def read() -> bytes:
        async with open_image(unclean) as disk:
            return bytes(await disk.read(0, SIZE))

    before = unclean.read_bytes()
    os.truncate(unclean, len(before) - (64 << 10))
    assert run(read) == b"\x77" * (64 << 10) + bytes(SIZE - (64 << 10))
    check_is_clean(unclean)
    unclean.write_bytes(before)
    os.truncate(unclean, len(before) - (256 << 10))
    assert run(read) == bytes(SIZE)
    check_is_clean(unclean)


@pytest.mark.parametrize(("corruptions", "check_errors"), [(2, 0), (0, 2)])
def test_what_the_repair_cannot_mend_is_not_opened(
    unclean: Path, corruptions: int, check_errors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(storage: Storage, header: Header, *, repair: Repair) -> CheckResult:
        return CheckResult(storage.path, header, corruptions=corruptions, check_errors=check_errors)

    monkeypatch.setattr(recovery, "check_image", check)
    before = unclean.read_bytes()
    error, text = message_of(unclean)
    assert isinstance(error, CorruptError)
    assert text == (
        f"{unclean}: was not closed cleanly, and 2 errors could not be repaired; see `qedfuse check -r all`"
    )
    assert unclean.read_bytes() == before


# -- refusals ---------------------------------------------------------------------------------------------------------


def message_of(path: Path, *, read_only: bool = False, policy: BackingPolicy | None = None) -> tuple[OSError, str]:
    async def opened() -> None:
        async with open_image(path, read_only=read_only, policy=policy or BackingPolicy()):
            pytest.fail("was opened")

    with pytest.raises(OSError, match=r".") as caught:
        run(opened)
    text = describe(caught.value, path)
    assert "\n" not in text
    return caught.value, text


@pytest.mark.parametrize("read_only", [False, True])
def test_files_that_are_no_images(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "file"

    def message() -> str:
        return message_of(path, read_only=read_only)[1]

    assert message() == f"{path}: no such file or directory"
    path.mkdir()
    assert "directory" in message()
    path.rmdir()
    os.mkfifo(path)
    assert message() == f"{path}: is not a regular file or a block device"
    path.unlink()
    for content in (b"", b"QE", bytes(4096), b"QFI\xfb\0\0\0\3" + bytes(504)):
        path.write_bytes(content)
        assert message() == f"{path}: not a qed image (no qed magic at the start)"
    path.write_bytes(b"QED\0" + bytes(20))
    assert "the header is cut off" in message()


def test_a_cut_off_image(image: Path) -> None:
    os.truncate(image, 100_000)
    error, text = message_of(image)
    assert isinstance(error, CorruptError)
    assert "the file is cut off" in text


def test_unknown_features(image: Path) -> None:
    content = bytearray(image.read_bytes())
    content[16] |= 0x80
    image.write_bytes(content)
    assert isinstance(message_of(image)[0], UnsupportedError)
    assert image.read_bytes() == content


@pytest.mark.parametrize("read_only", [False, True])
def test_the_policy_holds_for_the_image(tmp_path: Path, read_only: bool) -> None:
    make_raw(tmp_path / "base.raw")
    (tmp_path / "root").mkdir()
    image = make_qed(tmp_path / "root" / "top.qed", "../base.raw")
    before = image.read_bytes()
    for policy in (BackingPolicy(allowed=False), BackingPolicy(root=str(tmp_path / "root"))):
        assert isinstance(message_of(image, read_only=read_only, policy=policy)[0], UnsupportedError)
    assert image.read_bytes() == before
    assert qemu_writes(image)


def test_an_image_that_is_its_own_backing_file(tmp_path: Path) -> None:
    assert message_of(make_qed(tmp_path / "a.qed", "a.qed"))[0].errno == errno.ELOOP


def test_nothing_is_written_before_the_chain_is_open(unclean: Path) -> None:
    content = bytearray(unclean.read_bytes())
    header = Header.decode(bytes(content[:HEADER_BYTES]), "")
    name = b"missing.raw"
    content[HEADER_BYTES : HEADER_BYTES + len(name)] = name
    content[:HEADER_BYTES] = Header(
        header.cluster_size,
        header.table_size,
        header.header_size,
        header.features | 1,
        0,
        1 << 63,  # an unknown autoclear bit
        header.l1_table_offset,
        header.image_size,
        HEADER_BYTES,
        len(name),
    ).encode()
    unclean.write_bytes(content)
    assert message_of(unclean)[0].errno == errno.ENOENT
    assert unclean.read_bytes() == content
    assert isinstance(message_of(unclean, policy=BackingPolicy(allowed=False))[0], UnsupportedError)
    assert unclean.read_bytes() == content


def test_a_file_without_permission(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller decides what to do instead: no silent fall-back to reading."""
    real_open = os.open

    def denied(path: str, flags: int, mode: int = 0o777) -> int:
        if path == str(image) and flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", denied)
    error, text = message_of(image)
    assert error.errno == errno.EROFS
    assert text == f"{image}: read-only file system"


def test_format_error_is_one(tmp_path: Path) -> None:
    image = make_qed(tmp_path / "a.qed", b"a\0b")
    assert isinstance(message_of(image)[0], FormatError)
