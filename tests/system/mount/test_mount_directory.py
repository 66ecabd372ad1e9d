"""Several images, and directories of images that come and go, in one directory mount."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.mounts import is_mounted, mounted, until_closed, wait_until
from tests.helpers.qemu.cli import is_free, new_image, new_overlay, one_line, qedfuse, qemu_has_open, qemu_img, qemu_io

MIB = 1 << 20


# -- images of the command line ---------------------------------------------------------------------------------------


def test_several_images(tmp_path: Path, point: Path) -> None:
    first = new_image(tmp_path / "first.qed", fill=1)
    second = new_image(tmp_path / "second.img", "2M", fill=2)
    with mounted(first, second, point):
        assert sorted(os.listdir(point)) == ["first.raw", "second.img.raw"]
        assert (point / "first.raw").stat().st_size == MIB
        assert (point / "second.img.raw").stat().st_size == 2 * MIB
        with (point / "first.raw").open("r+b") as file:
            file.write(b"1st")
        assert (point / "second.img.raw").read_bytes()[:65536] == b"\2" * 65536
        assert not is_free(second)  # as long as the mount lives
    qemu_io(first, f"read -P {ord('1')} 0 1")


def test_two_images_of_one_name_are_refused(tmp_path: Path, point: Path) -> None:
    (tmp_path / "sub").mkdir()
    first, second = new_image(tmp_path / "disk.qed"), new_image(tmp_path / "sub" / "disk.qed")
    one_line(qedfuse("mount", first, second, point), 1, str(first), str(second), "disk.raw")
    assert not is_mounted(point)
    assert is_free(first) and is_free(second)


def test_nothing_can_be_made_or_removed(tmp_path: Path, point: Path) -> None:
    with mounted(new_image(tmp_path / "disk.qed"), point):
        raw = point / "disk.raw"
        for attempt in (
            (point / "new").touch,
            (point / "new").mkdir,
            lambda: (point / "new").symlink_to("x"),
            lambda: (point / "new").hardlink_to(raw),
            raw.unlink,
            lambda: raw.rename(point / "other"),
        ):
            with raises_errno(errno.EPERM):
                attempt()
        with raises_errno(errno.ENOENT):
            (point / "none.raw").stat()
        assert os.listdir(point) == ["disk.raw"]
        assert stat.S_ISDIR(point.stat().st_mode)


# -- directories ------------------------------------------------------------------------------------------------------


def test_a_directory_shows_every_image_in_it(source: Path, point: Path) -> None:
    new_image(source / "a.qed", fill=7)
    new_image(source / "b.disk")
    (source / "raw.img").write_bytes(b"no qed" * 100)
    (source / "sub.qed").mkdir()
    os.mkfifo(source / "fifo.qed")
    (source / "link.qed").symlink_to("a.qed")
    (source / "dangling.qed").symlink_to("nowhere")
    (source / "back.qed").symlink_to(point / "a.raw")
    with mounted(source, point):
        assert sorted(os.listdir(point)) == ["a.raw", "b.disk.raw", "link.raw"]
        assert (point / "a.raw").read_bytes() == b"\7" * 65536 + bytes(MIB - 65536)
        assert (point / "link.raw").stat().st_ino == (point / "a.raw").stat().st_ino
        assert not (point / "back.raw").exists()
        assert not (point / "a.qed").exists()


def test_images_come_and_go(source: Path, point: Path) -> None:
    new_image(source / "a.qed", fill=1)
    with mounted(source, point):
        assert os.listdir(point) == ["a.raw"]
        new_image(source / "b.qed", "3M", fill=2)
        wait_until(lambda: sorted(os.listdir(point)) == ["a.raw", "b.raw"])
        assert (point / "b.raw").stat().st_size == 3 * MIB
        assert (point / "b.raw").read_bytes()[0] == 2
        (source / "a.qed").unlink()
        wait_until(lambda: not (point / "a.raw").exists())
        assert os.listdir(point) == ["b.raw"]
        (source / "b.qed").rename(source / "c.qed")
        wait_until((point / "c.raw").exists)
        assert (point / "c.raw").read_bytes()[0] == 2


def test_an_open_image_survives_its_name(source: Path, point: Path) -> None:
    new_image(source / "a.qed", fill=1)
    with mounted(source, point), (point / "a.raw").open("r+b", buffering=0) as file:
        (source / "a.qed").unlink()
        new_image(source / "a.qed", "2M", fill=2)
        assert os.pread(file.fileno(), 1, 0) == b"\1"
        os.pwrite(file.fileno(), b"x", 5)
        with raises_errno(errno.ESTALE):  # it would be for nothing
            os.fsync(file.fileno())
        wait_until(lambda: (point / "a.raw").stat().st_size == 2 * MIB)
        assert (point / "a.raw").read_bytes()[0] == 2
        assert os.pread(file.fileno(), 6, 0) == b"\1" * 5 + b"x"


def test_an_image_that_others_change_is_seen_anew(source: Path, point: Path) -> None:
    """Its bytes and its size, although the kernel keeps pages and sizes of files that it knows."""
    image = new_image(source / "a.qed", fill=1)
    with mounted(source, point):
        raw = point / "a.raw"
        assert raw.read_bytes()[:2] == b"\1\1"
        number = raw.stat().st_ino
        until_closed(point)
        assert raw.stat().st_ino == number  # we have not changed it
        qemu_io(image, "write -P 9 0 4k")
        qemu_img("resize", "-f", "qed", image, "4M")
        wait_until(lambda: raw.stat().st_size == 4 * MIB)
        assert raw.read_bytes()[:2] == b"\x09\x09"
        with raw.open("r+b") as file:
            file.write(b"mine")
        assert raw.read_bytes()[:5] == b"mine\x09"


def is_free_to_read(image: Path) -> bool:
    """Nobody has the image open for writing."""
    command = ["qemu-io", "-r", "-f", "qed", "-c", "read 0 512", str(image)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_an_image_is_closed_after_its_last_use(source: Path, point: Path) -> None:
    image = new_image(source / "a.qed", fill=1)
    with mounted(source, point):
        assert is_free(image)
        with (point / "a.raw").open("r+b") as file:
            file.write(b"x" * 4096)
            file.flush()
            assert not is_free(image)
        wait_until(lambda: is_free(image))
        qemu_img("check", image)
        qemu_io(image, f"read -P {ord('x')} 0 4k")
        assert (point / "a.raw").stat().st_size == MIB


def test_the_time_of_change_survives_the_close(source: Path, point: Path) -> None:
    image = new_image(source / "a.qed", fill=1)
    with mounted(source, point):
        raw = point / "a.raw"
        with raw.open("r+b") as file:
            file.write(b"x")
        os.utime(raw, ns=(10**18, 10**18))
        wait_until(lambda: is_free_to_read(image))
        assert image.stat().st_mtime_ns == raw.stat().st_mtime_ns == 10**18


def test_a_broken_image_does_not_hurt_the_others(source: Path, point: Path) -> None:
    good = new_image(source / "good.qed", fill=5)
    (source / "empty.qed").touch()
    (source / "noise.qed").write_bytes(b"noise" * 1000)
    shutil.copy(good, source / "cut.qed")
    os.truncate(source / "cut.qed", 70_000)  # inside the L1 table
    shutil.copy(good, source / "feature.qed")
    with (source / "feature.qed").open("r+b") as file:
        file.seek(16)
        file.write(b"\x80")
    qemu_img("create", "-q", "-f", "qed", "-b", good, "-F", "qed", source / "orphan.qed")
    with (source / "orphan.qed").open("r+b") as file:
        content = file.read()
        file.seek(content.index(b"good.qed"))
        file.write(b"gone.qed")
    with mounted(source, point) as mount:
        names = ["cut", "empty", "feature", "good", "noise", "orphan"]
        assert sorted(os.listdir(point)) == [f"{name}.raw" for name in names]
        for name in names:
            if name == "good":
                continue
            with raises_errno(errno.EIO):
                (point / f"{name}.raw").read_bytes()
            assert f"{name}.qed" in mount.text()
        assert [(point / f"{name}.raw").stat().st_size for name in ("empty", "noise", "feature")] == [0, 0, 0]
        assert (point / "good.raw").read_bytes()[:65536] == b"\5" * 65536
        assert "Traceback" not in mount.text()
        # and it heals
        shutil.copy(good, source / "empty.qed")
        wait_until(lambda: (point / "empty.raw").stat().st_size == MIB)
        assert (point / "empty.raw").read_bytes()[:65536] == b"\5" * 65536


def test_an_image_in_use_elsewhere_is_busy(source: Path, point: Path) -> None:
    image = new_image(source / "a.qed", fill=5)
    with mounted(source, point) as mount:
        with qemu_has_open(image), raises_errno(errno.EBUSY):
            (point / "a.raw").read_bytes()
        assert "in use" in mount.text()
        wait_until(lambda: (point / "a.raw").stat().st_size == MIB)
        assert (point / "a.raw").read_bytes()[0] == 5


def test_an_overlay_and_its_backing_file_are_read_side_by_side(source: Path, point: Path) -> None:
    new_image(source / "base.qed", fill=5)
    qemu_img("create", "-q", "-f", "qed", "-b", "base.qed", "-F", "qed", source / "top.qed")
    with mounted(source, point), (point / "top.raw").open("r+b") as top:
        assert top.read(1) == b"\5"
        with (point / "base.raw").open("rb") as base:  # shared, for reading
            assert base.read(1) == b"\5"
        wait_until(lambda: is_free_to_read(source / "base.qed"))
        with raises_errno(errno.EBUSY):
            (point / "base.raw").open("r+b")


def test_a_backing_file_in_the_mount_itself_is_refused(source: Path, point: Path) -> None:
    """It would wait for itself."""
    new_image(source / "base.qed", fill=5)
    new_image(source / "loop.qed")
    for name, backing in (("top", point / "base.raw"), ("loop", point / "loop.raw")):
        new_overlay(source / f"{name}.qed", backing)
    with mounted(source, point) as mount:
        for name in ("top", "loop"):
            with raises_errno(errno.EIO):
                (point / f"{name}.raw").read_bytes()
        assert f"which lies in a qedfuse mount ({point})" in mount.text()
        assert (point / "base.raw").read_bytes()[0] == 5


def test_several_directories_and_images_together(source: Path, tmp_path: Path, point: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    new_image(source / "same.qed", fill=1)
    new_image(source / "one.qed", fill=2)
    new_image(other / "same.qed", fill=3)
    new_image(other / "two.qed", fill=4)
    named = new_image(tmp_path / "one.qed", fill=5)
    with mounted(named, source, other, point):
        assert sorted(os.listdir(point)) == ["one.raw", "same.raw", "two.raw"]
        found = {name: (point / name).read_bytes()[0] for name in os.listdir(point)}
        assert found == {"one.raw": 5, "same.raw": 1, "two.raw": 4}
        shutil.rmtree(source)
        wait_until(lambda: (point / "same.raw").read_bytes()[0] == 3)


def test_a_read_only_directory(source: Path, point: Path) -> None:
    image = new_image(source / "a.qed", fill=1)
    with mounted("--ro", source, point):
        assert stat.S_IMODE((point / "a.raw").stat().st_mode) & 0o222 == 0
        assert (point / "a.raw").read_bytes()[0] == 1
        with raises_errno(errno.EROFS):
            (point / "a.raw").open("r+b")
        assert is_free_to_read(image)


def test_500_images(source: Path, point: Path) -> None:
    template = new_image(source / "0.qed", fill=1)
    content = template.read_bytes()
    for number in range(1, 500):
        (source / f"{number}.qed").write_bytes(content)
    with mounted(source, point):
        start = time.monotonic()
        listed = subprocess.run(["ls", "-ln", str(point)], capture_output=True, text=True, check=True).stdout
        assert time.monotonic() - start < 5  # takes 0.1 s; opening each would take much longer
        lines = listed.splitlines()[1:]
        assert len(lines) == 500
        assert all(f" {MIB} " in line for line in lines)
        assert len({entry.inode() for entry in os.scandir(point)}) == 500
        files = [(point / f"{number}.raw").open("rb", buffering=0) for number in range(500)]
        try:
            assert all(os.pread(file.fileno(), 1, 0) == b"\1" for file in files)
        finally:
            for file in files:
                file.close()


def test_500_images_of_the_command_line(source: Path, point: Path) -> None:
    content = new_image(source / "0.qed", fill=1).read_bytes()
    images = [source / f"{number}.qed" for number in range(500)]
    for image in images[1:]:
        image.write_bytes(content)
    with mounted(*images, point):
        assert len(os.listdir(point)) == 500
        assert (point / "499.raw").read_bytes()[0] == 1


def test_a_directory_that_would_be_hidden_is_refused(tmp_path: Path, source: Path) -> None:
    new_image(source / "a.qed")
    one_line(qedfuse("mount", source, source), 2, str(source), "hidden")
    one_line(qedfuse("mount", source, tmp_path), 2, str(source), "hidden")
    raw = tmp_path / "file.raw"
    raw.touch()
    one_line(qedfuse("mount", source, raw), 2, str(source), "is a directory")
    assert not is_mounted(source) and not is_mounted(tmp_path) and not is_mounted(raw)


def test_a_mountpoint_inside_its_source(source: Path) -> None:
    new_image(source / "a.qed", fill=1)
    point = source / "mnt"
    point.mkdir()
    with mounted(source, point):
        assert os.listdir(point) == ["a.raw"]
        assert (point / "a.raw").read_bytes()[0] == 1
