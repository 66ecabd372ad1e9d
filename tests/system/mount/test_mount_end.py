"""How a mount ends: by whom ever, everything is flushed and closed, and nothing stays behind."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.mounts.injection import injected
from tests.helpers.mounts.mounts import Mounted, is_mounted, kill, mounted, new_namespace, wait_for_exit, wait_until
from tests.helpers.qemu.cli import Result, is_free, one_line, qedfuse, qemu_img, qemu_io

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", path, "64M")
    return path


def assert_clean(image: Path, fill: int, offset: int = 30 * MIB) -> None:
    """Closed: the marks are off, and what was written is there."""
    assert not json.loads(qemu_img("info", "--output=json", image))["dirty-flag"]
    qemu_img("check", image)
    qemu_io(image, f"read -P {fill} {offset} 64k")


def fill(raw: Path, byte: int, offset: int = 30 * MIB) -> None:
    """Write without any fsync."""
    with raw.open("r+b") as file:
        file.seek(offset)
        file.write(bytes([byte]) * 65536)


def by_umount(mount: Mounted) -> None:
    assert mount.umount() == Result(0, "", "")


def by_umount8(mount: Mounted) -> None:
    subprocess.run(["umount", str(mount.point)], check=True)


def by_fusermount(mount: Mounted) -> None:
    subprocess.run(["fusermount3", "-u", str(mount.point)], check=True)


def by_signal(number: signal.Signals) -> Callable[[Mounted], None]:
    return lambda mount: kill(mount.pid(), number)


WAYS = {
    "qedfuse umount": by_umount,
    "umount": by_umount8,
    "fusermount3": by_fusermount,
    "SIGTERM": by_signal(signal.SIGTERM),
    "SIGINT": by_signal(signal.SIGINT),
    "SIGHUP": by_signal(signal.SIGHUP),
}


@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_flushes_and_closes(image: Path, raw: Path, way: str, foreground: bool) -> None:
    with mounted(image, raw, foreground=foreground) as mount:
        fill(raw, 0x77)
        pid = mount.pid()
        WAYS[way](mount)
        if mount.process:
            assert mount.process.wait(20) == 0, mount.text()
        else:
            wait_for_exit(pid)
        assert not is_mounted(raw)
        assert "Traceback" not in mount.text()
    assert_clean(image, 0x77)


def test_umount_returns_when_the_image_is_closed(image: Path, raw: Path) -> None:
    """At once afterwards: no waiting here."""
    for number in range(1, 6):
        with mounted(image, raw) as mount:
            fill(raw, number)
            assert mount.umount() == Result(0, "", "")
            assert_clean(image, number)


def test_umount_of_a_mount_in_use_fails_and_changes_nothing(image: Path, raw: Path) -> None:
    with mounted(image, raw) as mount:
        with raw.open("r+b", buffering=0) as file:
            one_line(mount.umount(), 1, str(raw), "in use")
            assert is_mounted(raw)
            file.write(b"still here")
        assert mount.umount().code == 0
    qemu_io(image, f"read -P {ord('s')} 0 1")


def test_umount_of_what_is_no_mount(raw: Path, tmp_path: Path) -> None:
    one_line(qedfuse("umount", raw), 1, str(raw), "is not a qedfuse mount")
    one_line(qedfuse("umount", tmp_path / "nothing"), 1, "nothing", "is not a qedfuse mount")
    one_line(qedfuse("umount", "/"), 1, "is not a qedfuse mount")


def test_a_signal_serves_users_to_their_end(image: Path, raw: Path) -> None:
    with mounted(image, raw) as mount:
        pid = mount.pid()
        with raw.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"\1" * 4096, 0)
            os.fsync(file.fileno())
            kill(pid)
            wait_until(lambda: not is_mounted(raw))
            assert raw.stat().st_size == 0  # the mountpoint is itself again
            os.pwrite(file.fileno(), b"\x55" * 65536, 30 * MIB)
            os.fsync(file.fileno())
            assert os.pread(file.fileno(), 3, 30 * MIB) == b"\x55" * 3
            assert "still" not in mount.text()
        wait_for_exit(pid)
        assert "serving until that ends" in mount.text()
    assert_clean(image, 0x55)
    qemu_io(image, "read -P 1 0 4096")


def test_a_second_signal_ends_it_at_once(image: Path, raw: Path) -> None:
    with mounted(image, raw, foreground=True) as mount:
        assert mount.process is not None
        fd = os.open(raw, os.O_RDWR)
        os.pwrite(fd, b"\x66" * 65536, 30 * MIB)
        os.fsync(fd)
        kill(mount.pid())
        wait_until(lambda: not is_mounted(raw))
        assert mount.process.poll() is None
        kill(mount.pid())
        assert mount.process.wait(20) == 1  # somebody's work was cut off
        with pytest.raises(OSError, match=r"not connected|aborted"):
            os.pread(fd, 512, 40 * MIB)
        with pytest.raises(OSError, match=r"not connected|aborted"):
            os.close(fd)
        assert "in use" in mount.text()
    assert_clean(image, 0x66)


def test_a_mount_that_ends_while_a_request_is_taken(image: Path, raw: Path) -> None:
    """The kernel says ECONNABORTED then, not ENODEV as it does to a daemon that comes later."""
    with mounted(image, raw, foreground=True) as mount:
        assert mount.process is not None
        with raw.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"\x67" * 65536, 30 * MIB)
            os.fsync(file.fileno())
        with injected(mount.pid(), "read,readv,splice:error=ECONNABORTED", path="/dev/fuse"):
            assert mount.process.poll() is None
            with pytest.raises(OSError, match=r"not connected|abort"):
                raw.open("rb").close()
            assert mount.process.wait(20) == 0
        assert "Traceback" not in mount.text()
        assert "has ended the connection" in mount.text()
    assert_clean(image, 0x67)


def test_a_killed_daemon_leaves_a_mount_that_umount_removes(image: Path, raw: Path) -> None:
    with mounted(image, raw) as mount:
        with raw.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"\x44" * 65536, 30 * MIB)
            os.fsync(file.fileno())
        pid = mount.pid()
        kill(pid, signal.SIGKILL)
        wait_for_exit(pid)
        with pytest.raises(OSError, match="not connected"):
            raw.open("rb")
        one_line(qedfuse("mount", image, raw), 1, str(raw), "already a qedfuse mount", "qedfuse umount")
        one_line(qedfuse("status", raw), 1, str(raw), "does not answer")
        one_line(mount.umount(), 1, str(raw), "unmounted, but", "does not answer")
        assert not is_mounted(raw)
        assert raw.stat().st_size == 0
        with mounted(image, raw):  # and what was fsynced is there
            assert raw.read_bytes()[30 * MIB :][:65536] == b"\x44" * 65536
    assert_clean(image, 0x44)


def test_mounting_again_at_once(image: Path, raw: Path) -> None:
    """Each mount tells its own daemon from the last one's, though the kernel gives it the same device number."""
    for number in range(1, 8):
        with mounted(image, raw):
            fill(raw, number)
            subprocess.run(["fusermount3", "-u", str(raw)], check=True)
            wait_until(lambda: is_free(image))
    assert_clean(image, 7)


@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
def test_a_failed_final_flush_is_told(image: Path, raw: Path, foreground: bool) -> None:
    """The tables of what was written and never fsynced cannot be written any more, and nobody waits for that to end."""
    with mounted(image, raw, foreground=foreground) as mount:
        fill(raw, 0x33)
        pid = mount.pid()
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        one_line(mount.umount(), 1, str(raw), "not unmounted", str(image), "file too large")
        assert is_mounted(raw)
        by_fusermount(mount)
        wait_until(lambda: not is_mounted(raw))
        with ended(pid) as has_ended:
            for _ in range(2):  # the first signal may come before it knows that it was unmounted
                kill(pid)
                if has_ended(5):
                    break
            assert has_ended(0), f"process {pid} does not end"
        if mount.process:
            assert mount.process.wait(20) == 1
    with mounted(image, raw):  # what was lost was never promised
        assert raw.read_bytes()[30 * MIB :][:65536] in (bytes(65536), b"\x33" * 65536)


@contextmanager
def ended(pid: int) -> Iterator[Callable[[float], bool]]:
    """Whether a process has ended after so many seconds."""
    fd = os.pidfd_open(pid)
    try:
        yield lambda seconds: bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


def test_a_loop_device_keeps_the_mount_until_it_is_detached(image: Path, raw: Path) -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("needs root and loop devices")
    with mounted(image, raw) as mount:
        done = subprocess.run(["losetup", "--find", "--show", str(raw)], capture_output=True, text=True, check=True)
        device = done.stdout.strip()
        try:
            one_line(mount.umount(), 1, str(raw), device)
            pid = mount.pid()
            kill(pid)
            wait_until(lambda: not is_mounted(raw))
            with open(device, "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), b"\x21" * 65536, 30 * MIB)
        finally:
            subprocess.run(["losetup", "-d", device], check=True)
        wait_for_exit(pid)
    assert_clean(image, 0x21)


def test_a_copy_in_another_namespace_does_not_hang_umount(image: Path, raw: Path) -> None:
    """A container that was started meanwhile has its own copy of every mount."""
    command = [*new_namespace(), "sh", "-c", "echo; read line"]
    with mounted(image, raw) as mount:
        pid = mount.pid()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as container:
            assert container.stdin is not None and container.stdout is not None
            container.stdout.readline()
            fill(raw, 0x12)
            one_line(mount.umount(), 1, str(raw), "another mount namespace", "all is flushed")
            assert not is_mounted(raw)
            container.stdin.close()
        wait_for_exit(pid)
    assert_clean(image, 0x12)
