"""Sources, images and backing files on a host that does not answer: all others go on, and signals end the mount.

A stopped FUSE file system stands in for a dead server.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.doubles.loopback import Loopback, loopback
from tests.helpers.mounts.impatient import PATIENCE
from tests.helpers.mounts.mounts import Mounted, aborted, is_mounted, mounted, status, wait_until
from tests.helpers.mounts.outsiders import SOON, finish, first_byte, run
from tests.helpers.qemu.cli import is_free, new_image, new_overlay, qemu_img, qemu_io

EIO = os.strerror(errno.EIO)


class Place(NamedTuple):
    """`source` is a directory here; `far` is one on the `host`, which shows what is in `behind`."""

    source: Path
    far: Path
    behind: Path
    point: Path
    host: Loopback


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    source, far, behind, point = (tmp_path / name for name in ("source", "far", "behind", "mnt"))
    for path in (source, far, behind, point):
        path.mkdir()
    with loopback(behind, far) as host:
        yield Place(source, far, behind, point, host)


@contextmanager
def impatient(place: Place, *words: str | Path) -> Iterator[Mounted]:
    """A mount that gives a host little time. It ends even if it hangs, as the host answers in the end: a process that
    has a file open there cannot end before."""
    with mounted(*words, place.point, foreground=True, module="tests.helpers.mounts.impatient") as mount:
        try:
            with aborted(place.point):
                yield mount
        finally:
            place.host.go_on()
            assert mount.process is not None
            mount.process.kill()


def write_and_sync(path: Path) -> None:
    code, _, err = finish(run("dd", "if=/dev/zero", f"of={path}", "bs=64k", "count=3", "conv=notrunc,fsync"))
    assert code == 0, err


def assert_alive(point: Path, name: str = "good") -> None:
    """An image here can be listed, opened, read and written."""
    code, _, err = finish(run("ls", "-l", point / f"{name}.raw"))
    assert code == 0, err
    first_byte(point / f"{name}.raw")
    write_and_sync(point / f"{name}.raw")


def test_a_backing_file_that_is_opened(place: Place) -> None:
    new_image(place.source / "good.qed", fill=7)
    (place.behind / "base.raw").write_bytes(b"b" * (1 << 20))
    for number in range(60):
        new_overlay(place.source / f"{number}.qed", place.far / "base.raw")
    with impatient(place, place.source) as mount:
        place.host.stop()
        readers = [run("head", "-c", "1", place.point / f"{number}.raw") for number in range(60)]
        assert_alive(place.point)
        assert [finish(reader) for reader in readers] == [(1, b"", EIO)] * 60
        assert "cannot open its backing file" in mount.text()
        started = time.monotonic()
        assert finish(run("head", "-c", "1", place.point / "0.raw")) == (1, b"", EIO)
        assert time.monotonic() - started < PATIENCE  # not asked again as long as the last one has not come back
        assert threads_of(mount.pid()) < 150
        place.host.go_on()
        wait_until(lambda: finish(run("head", "-c", "1", place.point / "0.raw")) == (0, b"b", ""))
        assert mount.umount().code == 0


def threads_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def test_a_backing_file_that_is_open(place: Place) -> None:
    new_image(place.source / "good.qed", fill=7)
    (place.behind / "base.raw").write_bytes(b"b" * (1 << 20))
    new_overlay(place.source / "top.qed", place.far / "base.raw")
    with impatient(place, place.source) as mount, (place.point / "top.raw").open("rb", buffering=0) as top:
        assert os.pread(top.fileno(), 1, 0) == b"b"
        place.host.stop()
        readers = [
            run("dd", f"if={place.point}/top.raw", "bs=4k", "count=1", f"skip={skip}", "iflag=direct", "status=none")
            for skip in range(100, 220)
        ]
        time.sleep(0.5)
        assert finish(run("stat", place.point / "top.raw"))[0] == 0
        assert_alive(place.point)
        assert finish(run("ls", "-l", place.point))[0] == 0
        assert status(place.point)["pid"] == mount.pid()
        place.host.go_on()
        assert all(finish(reader)[:2] == (0, b"b" * 4096) for reader in readers)


#: Opens a file, says so, and writes and syncs 4 KiB of it when it is told to.
WRITER = """
import os, sys
file = os.open(sys.argv[1], os.O_RDWR)
print(flush=True)
sys.stdin.readline()
os.pwrite(file, bytes(4096), int(sys.argv[2]) * 4096)
os.fsync(file)
"""


def start_writer(path: Path, number: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, str(path), str(number)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
    return process


def write_now(writer: subprocess.Popen[bytes]) -> None:
    assert writer.stdin is not None
    writer.stdin.close()


def test_an_image(place: Place) -> None:
    """Reads, writes, syncs, attributes, closing."""
    new_image(place.source / "good.qed", fill=7)
    image = new_image(place.behind / "far.qed", fill=7)
    (place.source / "far.qed").symlink_to(place.far / "far.qed")
    raw = place.point / "far.raw"
    with impatient(place, place.source) as mount:
        writers = [start_writer(raw, number) for number in range(20)]
        place.host.stop()
        for writer in writers:
            write_now(writer)
        time.sleep(0.5)
        finish(run("stat", raw))  # it ends
        assert finish(run("ls", place.point))[:2] == (0, b"good.raw\n")
        assert_alive(place.point)
        assert status(place.point)["pid"] == mount.pid()
        place.host.go_on()
        assert [writer.wait(SOON) for writer in writers] == [0] * 20
        place.host.stop()
        time.sleep(1)  # it is being closed
        assert_alive(place.point)
        place.host.go_on()
        wait_until(lambda: finish(run("head", "-c", "1", raw))[:2] == (0, b"\0"))
        assert raw.stat().st_blocks > 0
        assert mount.umount().code == 0
    qemu_img("check", image)


def test_an_image_that_is_open_for_reading_can_be_unmounted(place: Place) -> None:
    """There is nothing in it that could be lost."""
    new_image(place.behind / "far.qed", fill=7)
    with impatient(place, "--ro", place.far / "far.qed") as mount:
        assert first_byte(place.point / "far.raw") == b"\7"
        place.host.stop()
        assert mount.umount().code == 0


def test_a_source_directory(place: Place, tmp_path: Path) -> None:
    new_image(place.behind / "both.qed", fill=1)
    new_image(place.source / "both.qed", fill=2)
    new_image(place.source / "good.qed", fill=3)
    with impatient(place, place.far, place.source) as mount:
        assert sorted(os.listdir(place.point)) == ["both.raw", "good.raw"]
        assert first_byte(place.point / "both.raw") == b"\1"
        place.host.stop()
        time.sleep(1.1)  # what the kernel knows of names is too old then
        code, out, _ = finish(run("ls", place.point))
        assert (code, out.split()) == (0, [b"good.raw"])
        assert_alive(place.point)
        found = finish(run("head", "-c", "1", place.point / "both.raw"))
        assert found == (1, b"", os.strerror(errno.ETIMEDOUT))  # rather than the other one of this name
        assert finish(run("stat", "-f", place.point))[0] == 0
        assert f"{place.far}: the host file system does not answer" in mount.text()
        place.host.go_on()
        wait_until(lambda: finish(run("head", "-c", "1", place.point / "both.raw"))[:2] == (0, b"\1"))


@pytest.mark.parametrize("used", ["reading", "opening"])
def test_a_second_signal(place: Place, used: str) -> None:
    """Whatever is waited for: the mount is gone, its users get errors, other images are flushed, the process ends."""
    good = new_image(place.source / "good.qed", fill=7)
    (place.behind / "base.raw").write_bytes(b"b" * (1 << 20))
    new_overlay(place.source / "top.qed", place.far / "base.raw")
    with impatient(place, "-o", "direct_io", place.source) as mount:
        process = mount.process
        assert process is not None
        file = os.open(place.point / "good.raw", os.O_RDWR)
        os.pwrite(file, b"x" * 4096, 0)
        if used == "reading":
            os.close(os.open(place.point / "top.raw", os.O_RDONLY))
        place.host.stop()
        readers = [run("head", "-c", "1", place.point / "top.raw") for _ in range(3)]
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: "serving until that ends" in mount.text(), SOON)
        process.send_signal(signal.SIGTERM)
        assert [finish(reader)[0] for reader in readers] == [1, 1, 1]
        wait_until(lambda: "closed, but" in mount.text(), SOON)
        assert not is_mounted(place.point)
        assert is_free(good)
        with suppress(OSError):  # it has lost its mount
            os.close(file)
        place.host.go_on()
        assert process.wait(SOON) == 1
        assert "Traceback" not in mount.text()
    qemu_img("check", good)
    qemu_io(good, f"read -P {ord('x')} 0 4k")


def test_closing_that_waits_for_the_host(place: Place) -> None:
    """After unmounting: a signal, and another one, end it."""
    image = new_image(place.behind / "far.qed", fill=7)
    (place.source / "far.qed").symlink_to(place.far / "far.qed")
    new_image(place.source / "good.qed", fill=7)
    with impatient(place, place.source) as mount:
        process = mount.process
        assert process is not None
        with (place.point / "far.raw").open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"x" * 4096, 0)
            os.fsync(file.fileno())
            place.host.stop()
        subprocess.run(["umount", place.point], check=True, timeout=SOON)
        wait_until(lambda: "unmounted, closing" in mount.text())
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: "closed, but" in mount.text(), SOON)
        place.host.go_on()
        assert process.wait(SOON) == 1
        assert f"{place.source}/far.qed: the host file system does not answer: not closed" in mount.text()
    qemu_img("check", image)
