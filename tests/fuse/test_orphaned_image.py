"""An image that is replaced (rename(2)): its name is the new one's at once, and no sync of the old one succeeds."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_image
from qedfuse.fuse.orphaned import check_not_orphaned
from tests.helpers.doubles.shortage import SHORTAGES, each_call_fails
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.modes import MODES, Mode
from tests.helpers.mounts.mounts import mounted, until_closed
from tests.helpers.qemu.cli import new_image, qemu_img, qemu_io

MIB = 1 << 20


@MODES
@pytest.mark.parametrize("wait", [False, True], ids=["open", "closed"])
def test_whoever_opens_the_name_gets_the_new_image(source: Path, point: Path, mode: Mode, wait: bool) -> None:
    image, raw = new_image(source / "a.qed", fill=1), point / "a.raw"
    new = new_image(source.parent / "new.qed", "2M", fill=2)
    with mounted(*mode, source, point):
        assert raw.read_bytes()[0] == 1
        if wait:
            until_closed(point)
            raw.stat()  # the kernel knows the name for another second
        new.rename(image)
        with raw.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"\x33" * 4096, 0)
            os.fsync(file.fileno())
            assert os.fstat(file.fileno()).st_size == 2 * MIB
        assert raw.read_bytes()[:4097] == b"\x33" * 4096 + b"\2"
    qemu_io(image, "read -P 0x33 0 4k", "read -P 2 4k 60k")


def test_truncate_by_name_is_the_new_images(source: Path, point: Path) -> None:
    image, raw = new_image(source / "a.qed", fill=1), point / "a.raw"
    new = new_image(source.parent / "new.qed", fill=2)
    with mounted(source, point), raw.open("rb"):
        new.rename(image)
        os.truncate(raw, 3 * MIB)
        assert raw.stat().st_size == 3 * MIB
    assert '"virtual-size": 3145728' in qemu_img("info", "--output=json", image)


@MODES
def test_a_sync_of_the_old_one_fails(source: Path, point: Path, mode: Mode) -> None:
    image, raw = new_image(source / "a.qed", fill=1), point / "a.raw"
    new = new_image(source.parent / "new.qed", fill=2)
    with mounted(*mode, source, point):
        fd = os.open(raw, os.O_RDWR)
        synced = os.open(raw, os.O_RDWR | os.O_SYNC)
        os.pwrite(fd, b"\x33" * 4096, 0)
        os.fsync(fd)
        os.pwrite(synced, b"\x33" * 4096, 4096)
        new.rename(image)
        assert os.pread(fd, 4096, 0) == b"\x33" * 4096
        os.pwrite(fd, b"\x44" * 4096, 0)
        for _ in range(2):
            with raises_errno(errno.ESTALE):
                os.fsync(fd)
        with raises_errno(errno.ESTALE):
            os.pwrite(synced, b"\x44" * 4096, 4096)
        assert os.pread(fd, 4096, 0) == b"\x44" * 4096
        os.fchmod(fd, 0o600)
        os.utime(fd, ns=(10**18, 10**18))
        os.close(fd)
        os.close(synced)
        assert raw.read_bytes()[0] == 2
    qemu_io(image, "read -P 2 0 64k")


@MODES
def test_one_that_was_renamed_or_deleted_can_be_synced(source: Path, point: Path, mode: Mode) -> None:
    image, raw = new_image(source / "a.qed", fill=1), point / "a.raw"
    other = new_image(source / "b.qed", fill=5)
    with mounted(*mode, source, point):
        fd = os.open(raw, os.O_RDWR)
        image.rename(source / "old.qed")
        new_image(source.parent / "new.qed", fill=2).rename(image)
        os.pwrite(fd, b"\x44" * 4096, 0)
        os.fsync(fd)
        os.close(fd)
        fd = os.open(point / "b.raw", os.O_RDWR)
        other.unlink()
        os.pwrite(fd, b"\x44" * 4096, 0)
        os.fsync(fd)
        os.close(fd)
    qemu_io(image, "read -P 2 0 64k")
    qemu_io(source / "old.qed", "read -P 0x44 0 4k", "read -P 1 4k 60k")


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("code", SHORTAGES, ids=os.strerror)
def test_what_cannot_be_told_is_no_sync_that_has_succeeded(source: Path, renamed: bool, code: int) -> None:
    image = new_image(source / "a.qed")
    new = new_image(source / "new.qed")

    async def main() -> None:
        async with open_image(image) as opened:
            await check_not_orphaned(opened)
            new.rename(image.rename(source / "b.qed") if renamed else image)
            for failing in each_call_fails(code, least=4):
                with failing(), raises_errno(code, errno.ESTALE):
                    await check_not_orphaned(opened)

    trio.run(main)


def test_an_image_over_a_file(source: Path) -> None:
    image, raw = new_image(source / "a.qed", fill=1), source.parent / "a.raw"
    raw.touch()
    with mounted(image, raw), raw.open("r+b", buffering=0) as file:
        file.write(b"x")
        os.fsync(file.fileno())
        new_image(source.parent / "new.qed", fill=2).rename(image)
        file.write(b"y")
        with raises_errno(errno.ESTALE):
            os.fsync(file.fileno())
