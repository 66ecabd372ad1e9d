"""Images of a directory mount that nobody uses: closing one never throws away what could not be written."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qedfuse.daemon.control import Client
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.guests import assert_clean, filesystem
from tests.helpers.mounts.injection import injected
from tests.helpers.mounts.modes import MODES, Mode
from tests.helpers.mounts.mounts import (
    Mounted,
    is_mounted,
    kill,
    mount_at,
    mounted,
    status,
    until_closed,
    wait_for_exit,
    wait_until,
)
from tests.helpers.qemu.cli import Name, Result, is_free, one_line, qemu_img, qemu_io

End = Callable[[Mounted], None]

KIB, MIB = 1 << 10, 1 << 20
DATA = b"\x5a" * (256 * KIB)

CACHED = pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
CACHED_OVERLAY = pytest.mark.parametrize(
    ("flags", "overlay"), [(0, False), (os.O_DIRECT, True)], ids=["buffered plain", "direct overlay"]
)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """A directory on a small file system."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    with filesystem(Path("none"), tmp_path / "images", "-t", "tmpfs", "-o", "size=4M") as path:
        yield path


def make(image: Path, *, overlay: bool) -> Path:
    options: list[Name] = []
    if overlay:
        base = image.parent.parent / "base.raw"
        base.write_bytes(b"\x11" * MIB)
        options = ["-b", base, "-F", "raw"]
    qemu_img("create", "-q", "-f", "qed", *options, image, "1M")
    return image


def pread(path: Path, size: int, offset: int, flags: int = 0) -> bytes:
    buffer = mmap.mmap(-1, size)
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        assert os.preadv(fd, [buffer], offset) == size
    finally:
        os.close(fd)
    return bytes(buffer)


def pwrite(path: Path, data: bytes, offset: int, flags: int = 0) -> None:
    """Write, and close at once, without a sync."""
    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        assert os.pwritev(fd, [buffer], offset) == len(data)
    finally:
        os.close(fd)


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def full(directory: Path) -> Iterator[None]:
    """No space is left in the directory's file system."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, raises_errno(errno.ENOSPC):
        while True:
            file.write(b"b" * 4096)
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def unwritten(source: Path, raw: Path, flags: int) -> Iterator[None]:
    """256 KiB were written, the file system is full since, and the image has been left alone for long enough."""
    pwrite(raw, DATA, 0, flags)
    with full(source):
        time.sleep(1.5)
        yield


@MODES
@CACHED_OVERLAY
def test_it_stays_open_while_there_is_no_space(
    source: Path, point: Path, mode: Mode, flags: int, overlay: bool
) -> None:
    image, raw = make(source / "a.qed", overlay=overlay), point / "a.raw"
    with mounted(*mode, source, point) as mount:
        with unwritten(source, raw, flags):
            assert "no space left" in status(point)["images"][0]["error"]
            with raises_errno(errno.ENOSPC):
                fsync(raw)
            one_line(mount.umount(), 1, str(point), "not unmounted", str(image), "no space left")
            assert is_mounted(point)
            assert pread(raw, len(DATA), 0, os.O_DIRECT) == DATA
        assert pread(raw, len(DATA), 0, os.O_DIRECT) == DATA
        fsync(raw)
        until_closed(point)
        assert mount.text().count("stays open until") == 1, mount.text()
        assert pread(raw, len(DATA), 0, os.O_DIRECT) == DATA
        assert mount.umount() == Result(0, "", "")
    qemu_io(image, f"read -P 0x5a 0 {len(DATA)}")
    assert_clean(image)


def by_fusermount(mount: Mounted) -> None:
    subprocess.run(["fusermount3", "-u", str(mount.point)], check=True)


def by_signal(mount: Mounted) -> None:
    kill(mount.pid())


ENDS = pytest.mark.parametrize("end", [by_fusermount, by_signal])


@ENDS
def test_a_mount_that_is_gone_is_served_until_there_is_space(source: Path, point: Path, end: End) -> None:
    """Nobody asked whether all can be written."""
    image, other = make(source / "a.qed", overlay=False), make(source / "b.qed", overlay=False)
    with mounted(source, point) as mount:
        with unwritten(source, point / "a.raw", os.O_DIRECT):
            assert pread(point / "b.raw", 512, 0) == bytes(512)  # it is open as well, for half a second
            pid = mount.pid()
            end(mount)
            wait_until(lambda: not is_mounted(point))
            wait_until(lambda: is_free(other))
            time.sleep(1)
            assert not is_free(image)
        wait_for_exit(pid)
        assert ": closed\n" in mount.text(), mount.text()
    qemu_io(image, f"read -P 0x5a 0 {len(DATA)}")
    assert_clean(image)


@ENDS
def test_a_signal_ends_the_waiting_for_space(source: Path, point: Path, end: End) -> None:
    image = make(source / "a.qed", overlay=True)
    with mounted(source, point, foreground=True) as mount:
        assert mount.process is not None
        with unwritten(source, point / "a.raw", os.O_DIRECT):
            end(mount)
            wait_until(lambda: not is_mounted(point))
            wait_until(lambda: "closing" in mount.text())
            time.sleep(0.2)
            assert mount.process.poll() is None
            kill(mount.pid())
            assert mount.process.wait(20) == 1
        assert "closed, but" in mount.text() and str(image) in mount.text()
    assert_clean(image, leaks=True)


def test_umount_does_not_wait_for_space(source: Path, point: Path) -> None:
    """If it runs out between the question and the end."""
    image = make(source / "a.qed", overlay=False)
    with mounted(source, point) as mount:
        pid = mount.pid()
        with unwritten(source, point / "a.raw", os.O_DIRECT):
            found = mount_at(point)
            assert found is not None
            with Client(found) as client:
                assert client.ask("wait") == {"waiting": True}
                by_fusermount(mount)
                answer = client.wait(20)
            assert answer is not None and answer["closed"] is False
            assert str(image) in answer["error"] and "no space left" in answer["error"]
        wait_for_exit(pid)
    qemu_io(image, f"read -P 0x5a 0 {len(DATA)}")


def test_an_image_over_a_file(source: Path, tmp_path: Path) -> None:
    """The same rules when a mount ends."""
    image, raw = make(source / "a.qed", overlay=False), tmp_path / "a.raw"
    raw.touch()
    with mounted(image, raw) as mount:
        with unwritten(source, raw, os.O_DIRECT):
            one_line(mount.umount(), 1, str(raw), "not unmounted", str(image), "no space left")
            assert pread(raw, len(DATA), 0, os.O_DIRECT) == DATA
            pid = mount.pid()
            by_fusermount(mount)
            time.sleep(1)
            assert not is_free(image)
        wait_for_exit(pid)
    qemu_io(image, f"read -P 0x5a 0 {len(DATA)}")


# -- a sync that fails ------------------------------------------------------------------------------------------------


@MODES
@CACHED
def test_a_failed_sync_is_remembered(tmp_path: Path, point: Path, mode: Mode, flags: int) -> None:
    directory = tmp_path / "images"
    directory.mkdir()
    image, raw = make(directory / "a.qed", overlay=False), point / "a.raw"
    other = make(directory / "b.qed", overlay=False)
    with mounted(*mode, directory, point) as mount:
        fd = os.open(raw, os.O_RDWR)
        os.pwrite(fd, b"x" * 4096, 0)
        with injected(mount.pid(), "fdatasync:error=EIO"), raises_errno(errno.EIO):
            os.fsync(fd)
        with raises_errno(errno.EIO):  # close(2) says it, too
            os.close(fd)
        time.sleep(1.5)
        for _ in range(2):
            with raises_errno(errno.EIO):
                fsync(raw)
            with raises_errno(errno.EIO):
                pwrite(raw, b"y" * 4096, 0, flags)
        pwrite(point / "b.raw", b"z" * 4096, 0)
        fsync(point / "b.raw")
        pread(raw, 4096, 0, flags)
        one_line(mount.umount(), 1, str(point), "unmounted, but not all is safe", str(image), "an earlier sync failed")
    qemu_img("check", other)
