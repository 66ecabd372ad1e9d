"""Reading an image through a mount changes nothing and keeps nobody from reading; the first writer is let in or not."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.guests import filesystem, need_filesystem
from tests.helpers.mounts.modes import MODES, Mode
from tests.helpers.mounts.mounts import mounted, opened, status, until_closed
from tests.helpers.qemu.cli import new_image, qemu_img, qemu_io
from tests.helpers.qemu.locks import TO_READ, TO_WRITE, lock_bytes, qemu_holding

KIB, MIB = 1 << 10, 1 << 20
DIRECT = os.O_RDONLY | os.O_DIRECT


def qemu_reads(image: Path, fill: int) -> None:
    done = subprocess.run(
        ["qemu-io", "-r", "-f", "qed", "-c", f"read -P {fill} 0 64k", str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "failed" not in done.stdout + done.stderr, done


@MODES
def test_base_and_overlay_are_read_in_any_order(source: Path, point: Path, mode: Mode) -> None:
    new_image(source / "base.qed", fill=5)
    new_image(source / "top.qed", "1M", "-b", "base.qed", "-F", "qed")
    with mounted(*mode, source, point), ExitStack() as stack:
        for name in ("base", "top", "base", "top"):
            assert (point / f"{name}.raw").read_bytes()[:65536] == b"\5" * 65536
        for name in ("base", "top"):
            fd = stack.enter_context(opened(point / f"{name}.raw", os.O_RDONLY))
            assert os.pread(fd, 1, 0) == b"\5"
        with raises_errno(errno.EBUSY):  # an overlay's base is not to be written
            os.open(point / "base.raw", os.O_RDWR)
        with opened(point / "top.raw", os.O_RDWR) as fd:
            os.pwrite(fd, b"x", 0)


def test_base_and_overlay_are_written_in_turn(source: Path, point: Path) -> None:
    """An image that only lingers is in nobody's way."""
    new_image(source / "base.qed", fill=5)
    new_image(source / "top.qed", "1M", "-b", "base.qed", "-F", "qed")
    with mounted(source, point):
        for number in range(10, 13):
            with (point / "base.raw").open("r+b") as file:
                file.write(bytes([number]) * 65536)
            assert (point / "top.raw").read_bytes()[:65536] == bytes([number]) * 65536


@MODES
def test_the_locks_and_the_file_are_a_readers_until_somebody_writes(source: Path, point: Path, mode: Mode) -> None:
    image, raw = new_image(source / "a.qed", fill=7), point / "a.raw"
    before = image.read_bytes(), image.stat()
    with mounted(*mode, source, point) as mount:
        pid = mount.pid()
        with opened(raw, os.O_RDONLY) as reader:
            assert os.pread(reader, 1, 0) == b"\7"
            assert lock_bytes(pid, str(image)) == TO_READ
            assert access_of(pid, image) == {os.O_RDONLY}
            qemu_reads(image, 7)
            assert not status(point)["images"][0]["writable"]
            assert raw.stat().st_mode & 0o777 == image.stat().st_mode & 0o666
            with opened(raw, os.O_RDWR) as writer:
                assert lock_bytes(pid, str(image)) == TO_WRITE
                assert access_of(pid, image) == {os.O_RDWR}
                os.pwrite(writer, b"\x09" * 8192, 60 * KIB)
                os.fsync(writer)
                assert os.pread(reader, 8192, 60 * KIB) == b"\x09" * 8192
            assert os.pread(reader, 8192, 60 * KIB) == b"\x09" * 8192
        until_closed(point)
    qemu_io(image, "read -P 7 0 60k", "read -P 9 60k 8k")
    assert before[0] != image.read_bytes()


def access_of(pid: int, image: Path) -> set[int]:
    """How a process has a file open."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        if os.path.realpath(f"/proc/{pid}/fd/{name}") == os.path.realpath(image):
            info = Path(f"/proc/{pid}/fdinfo/{name}").read_text()
            found.add(int(info.split("flags:")[1].split()[0], 8) & os.O_ACCMODE)
    return found


def test_reading_changes_nothing(source: Path, point: Path) -> None:
    image, raw = new_image(source / "a.qed", fill=7), point / "a.raw"
    before = image.read_bytes(), image.stat().st_mtime_ns, image.stat().st_ctime_ns
    with mounted(source, point):
        for _ in range(2):
            assert raw.read_bytes()[:65536] == b"\7" * 65536
            until_closed(point)
    assert (image.read_bytes(), image.stat().st_mtime_ns, image.stat().st_ctime_ns) == before


@MODES
def test_two_daemons_read_one_image(source: Path, point: Path, mode: Mode) -> None:
    new_image(source / "a.qed", fill=7)
    other = point.with_name("other")
    other.mkdir()
    with mounted(*mode, source, point), mounted(*mode, source, other):
        with opened(point / "a.raw", DIRECT) as first, opened(other / "a.raw", DIRECT) as second:
            for fd in (first, second):
                assert os.pread(fd, 4096, 0) == b"\7" * 4096
            for path in (point, other):
                with raises_errno(errno.EBUSY):
                    os.open(path / "a.raw", os.O_RDWR)
                with raises_errno(errno.EBUSY):
                    os.truncate(path / "a.raw", MIB // 2)
            for fd in (first, second):
                assert os.pread(fd, 4096, 4096) == b"\7" * 4096
        until_closed(other)
        with opened(point / "a.raw", os.O_RDWR) as writer:
            os.pwrite(writer, b"x", 0)
            with raises_errno(errno.EBUSY):
                os.open(other / "a.raw", os.O_RDONLY)


def test_no_writer_beside_qemu(source: Path, point: Path) -> None:
    """That reads the image: the writer is refused, and the readers go on."""
    image, raw, tool = new_image(source / "a.qed", fill=7), point / "a.raw", "qemu-nbd"
    with mounted(source, point) as mount:
        pid = mount.pid()
        with opened(raw, DIRECT) as reader, qemu_holding(tool, str(image), writable=False):
            with raises_errno(errno.EBUSY):
                os.open(raw, os.O_RDWR)
            assert lock_bytes(pid, str(image)) == TO_READ
            assert os.pread(reader, 4096, 0) == b"\7" * 4096
            assert "in use by another process" in mount.text()
        with opened(raw, os.O_RDWR) as writer:
            os.pwrite(writer, b"x", 0)
        until_closed(point)
        with qemu_holding(tool, str(image), writable=True), raises_errno(errno.EBUSY):
            os.open(raw, os.O_RDONLY)


def spoil(image: Path) -> None:
    """As a crash may leave it: marked, and with an entry that points outside of the file."""
    with image.open("r+b") as file:
        header = file.read(64)
        file.seek(16)
        file.write((int.from_bytes(header[16:24], "little") | 2).to_bytes(8, "little"))
        file.seek(int.from_bytes(header[40:48], "little"))
        table = int.from_bytes(file.read(8), "little")
        file.seek(table + 8)
        file.write((1 << 40).to_bytes(8, "little"))


@MODES
def test_an_unclean_image_is_read_as_it_is_and_repaired_for_a_writer(source: Path, point: Path, mode: Mode) -> None:
    image, raw = new_image(source / "a.qed", fill=7), point / "a.raw"
    spoil(image)
    before = image.read_bytes()
    expected = b"\7" * 65536 + bytes(MIB - 65536)
    with mounted(*mode, source, point) as mount:
        with opened(raw, DIRECT) as reader:
            assert os.pread(reader, MIB, 0) == expected
            assert image.read_bytes() == before
            assert "checking" not in mount.text()
            with opened(raw, os.O_RDWR) as writer:
                assert "is consistent" in mount.text()
                assert os.pread(reader, MIB, 0) == expected
                os.pwrite(writer, b"\x08" * 65536, 65536)
                os.fsync(writer)
                assert os.pread(reader, 65536, 65536) == b"\x08" * 65536
        until_closed(point)
    qemu_img("check", image)
    qemu_io(image, "read -P 7 0 64k", "read -P 8 64k 64k", "read -P 0 128k 896k")


@MODES
def test_an_overlay_file_system_copies_nothing_for_readers(tmp_path: Path, point: Path, mode: Mode) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount an overlay file system")
    need_filesystem("overlay")
    with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs") as host:
        for name in ("lower", "upper", "work"):
            (host / name).mkdir()
        image = new_image(host / "lower" / "a.qed", fill=7)
        before = image.read_bytes()
        options = f"lowerdir={host}/lower,upperdir={host}/upper,workdir={host}/work"
        with filesystem(Path("none"), tmp_path / "merged", "-t", "overlay", "-o", options) as merged:
            with mounted(*mode, merged, point):
                with opened(point / "a.raw", DIRECT) as reader:
                    assert os.pread(reader, 4096, 0) == b"\7" * 4096
                    assert os.listdir(host / "upper") == []
                    with opened(point / "a.raw", os.O_RDWR) as writer:
                        os.pwrite(writer, b"\x08" * 4096, 0)
                        os.fsync(writer)
                        assert os.pread(reader, 4096, 0) == b"\x08" * 4096
                        assert (point / "a.raw").read_bytes()[:4097] == b"\x08" * 4096 + b"\7"
                until_closed(point)
            assert image.read_bytes() == before
            qemu_io(merged / "a.qed", "read -P 8 0 4k", "read -P 7 4k 60k")


@MODES
def test_readers_go_on_while_writers_come_and_go(source: Path, point: Path, mode: Mode) -> None:
    """Over a base, whose data and tables are read while the image that refers to them changes hands."""
    new_image(source / "base.qed", fill=5)
    new_image(source / "top.qed", "1M", "-b", "base.qed", "-F", "qed")
    raw = point / "top.raw"
    ended = threading.Event()
    problems: list[str] = []
    versions = [5]

    def read() -> None:
        while not ended.is_set():
            with opened(raw, DIRECT) as fd:
                for _ in range(20):
                    allowed = versions[-2:]
                    data = os.pread(fd, 32768, 0)
                    allowed = sorted({*allowed, *versions[-2:]})
                    if any(data[at : at + 4096] not in [bytes([byte]) * 4096 for byte in allowed] for at in (0, 28672)):
                        problems.append(f"{data[0]} {data[28672]} instead of {allowed}")

    with mounted(*mode, source, point) as mount:
        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for version in range(6, 18):
                with opened(raw, os.O_RDWR | os.O_DIRECT) as fd:
                    versions.append(version)
                    for at in range(0, 32768, 4096):
                        os.pwrite(fd, aligned(bytes([version]) * 4096), at)
                time.sleep(0.05)
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert not problems, problems[:3]
        assert "internal error" not in mount.text()
    qemu_io(source / "top.qed", f"read -P {versions[-1]} 0 32k", "read -P 5 32k 32k")


def aligned(data: bytes) -> memoryview:
    import mmap

    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    return memoryview(buffer)


def test_a_base_that_was_replaced_just_now(source: Path, point: Path) -> None:
    """While the overlay is not used any more, and still open."""
    new_image(source / "base.qed", fill=5)
    new_image(source / "top.qed", "1M", "-b", "base.qed", "-F", "qed")
    new = new_image(source.parent / "new.qed", fill=6)
    with mounted(source, point):
        with opened(point / "top.raw", os.O_RDWR) as fd:
            os.pwrite(fd, b"\x0a" * 65536, 65536)
        new.rename(source / "base.qed")
        assert (point / "top.raw").read_bytes()[:131072] == b"\6" * 65536 + b"\x0a" * 65536


def test_what_may_not_be_written_says_so_in_its_mode(source: Path, point: Path) -> None:
    """A file system that is mounted read-only, below images that are opened for reading anyway."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system read-only")
    new_image(source / "a.qed", fill=7)
    with filesystem(source, source, "--bind"):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(source)], check=True)
        with mounted(source, point):
            raw = point / "a.raw"
            with opened(raw, os.O_RDONLY):
                assert raw.stat().st_mode & 0o222 == 0
                with raises_errno(errno.EROFS):
                    os.open(raw, os.O_RDWR)
                assert raw.stat().st_mode & 0o222 == 0
            assert raw.stat().st_mode & 0o222 == 0
