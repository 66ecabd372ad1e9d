"""One image over a file: what is read, written and shown, through a real mount."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
import subprocess
from pathlib import Path

import pytest

from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.mounts import is_mounted, mounted, need_fuse
from tests.helpers.qemu.cli import Result, one_line, qedfuse, qemu_img, qemu_io

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """64 MiB, with 1 MiB of 0x11 at the start and of 0x22 at 10 MiB; made by QEMU."""
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", path, "64M")
    qemu_io(path, "write -P 0x11 0 1M", "write -P 0x22 10M 1M")
    return path


def check(image: Path) -> None:
    """Closed cleanly: no errors, no leaks, and not marked as in need of a check."""
    done = subprocess.run(["qemu-img", "check", str(image)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert "ERROR" not in done.stdout + done.stderr, done
    assert not json.loads(qemu_img("info", "--output=json", image))["dirty-flag"]


def repair(copy: Path) -> None:
    """Check an image as a crash leaves it: leaked clusters are allowed."""
    done = subprocess.run(["qemu-img", "check", "-r", "all", str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3) and "ERROR" not in done.stdout + done.stderr, done


def test_the_image_appears_in_the_file(image: Path, raw: Path) -> None:
    with mounted(image, raw):
        assert raw.stat().st_size == 64 * MIB
        data = raw.read_bytes()
        assert data == b"\x11" * MIB + bytes(9 * MIB) + b"\x22" * MIB + bytes(53 * MIB)
    assert raw.stat().st_size == 0
    check(image)


def test_what_is_written_is_in_the_image(image: Path, raw: Path) -> None:
    rnd = random.Random(1)
    expected = bytearray(64 * MIB)
    expected[:MIB] = b"\x11" * MIB
    expected[10 * MIB : 11 * MIB] = b"\x22" * MIB
    with mounted(image, raw), raw.open("r+b", buffering=0) as file:
        for _ in range(200):
            offset, data = rnd.randrange(63 * MIB), rnd.randbytes(rnd.choice([1, 511, 4096, 70_000]))
            file.seek(offset)
            assert file.write(data) == len(data)
            expected[offset : offset + len(data)] = data
        os.fsync(file.fileno())
        assert raw.read_bytes() == expected
        file.close()
    check(image)
    flat = raw.with_suffix(".flat")
    qemu_img("convert", "-O", "raw", image, flat)
    assert flat.read_bytes() == expected
    with mounted(image, raw):
        assert raw.read_bytes() == expected


def test_what_is_fsynced_is_in_the_file_while_it_is_mounted(image: Path, raw: Path, tmp_path: Path) -> None:
    with mounted(image, raw):
        with raw.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"safe" * 1024, 30 * MIB)
            os.fsync(file.fileno())
        copy = tmp_path / "copy.qed"
        copy.write_bytes(image.read_bytes())  # as a crash would leave it
    repair(copy)
    qemu_io(copy, f"read -P {ord('s')} {30 * MIB} 1")


def test_a_backing_file_shines_through_and_stays_as_it_was(tmp_path: Path, raw: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(2).randbytes(3 * MIB))
    before = base.read_bytes()
    overlay = tmp_path / "overlay.qed"
    qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "raw", overlay, "8M")
    with mounted(overlay, raw):
        assert raw.read_bytes() == before + bytes(5 * MIB)
        with raw.open("r+b") as file:
            file.seek(MIB + 5)
            file.write(b"new")
    assert base.read_bytes() == before
    qemu_io(overlay, f"read -P {ord('n')} {MIB + 5} 1", f"read -P {before[MIB + 8]} {MIB + 8} 1")
    check(overlay)


# -- attributes -------------------------------------------------------------------------------------------------------


def test_the_file_has_the_images_owner_mode_and_times(image: Path, raw: Path) -> None:
    os.utime(image, ns=(1_234_567_890_123_456_789, 1_000_000_000_987_654_321))
    image.chmod(0o751)
    os.chown(image, 1234, 2345)
    before = image.stat()
    with mounted(image, raw):
        status = raw.stat()
        assert stat.S_ISREG(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o640
        assert (status.st_uid, status.st_gid) == (1234, 2345)
        assert status.st_mtime_ns == before.st_mtime_ns
        assert image.stat().st_mtime_ns == before.st_mtime_ns  # mounting changes nothing
    assert image.stat().st_mtime_ns == before.st_mtime_ns


def test_st_blocks_is_the_space_of_image_and_backing_file(tmp_path: Path, raw: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * (2 * MIB))
    overlay = tmp_path / "overlay.qed"
    qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "raw", overlay, "8M")
    with mounted(overlay, raw):
        assert raw.stat().st_blocks == overlay.stat().st_blocks + base.stat().st_blocks
        raw.write_bytes(b"x" * (8 * MIB))
        with raw.open("r+b") as file:
            os.fsync(file.fileno())
        assert raw.stat().st_blocks == 8 * MIB // 512  # never more than the size, metadata or not


def test_time_of_change_follows_writes_and_can_be_set(image: Path, raw: Path) -> None:
    os.utime(image, ns=(0, 0))
    with mounted(image, raw):
        with raw.open("r+b") as file:
            file.write(b"x")
        assert raw.stat().st_mtime_ns > 0
        os.utime(raw, ns=(5_000_000_000, 7_000_000_007))
        assert raw.stat().st_mtime_ns == 7_000_000_007
        assert image.stat().st_mtime_ns == 7_000_000_007
    assert image.stat().st_mtime_ns == 7_000_000_007  # closing writes to the image, but is no change of the raw file


def test_chmod_and_chown_go_to_the_image(image: Path, raw: Path) -> None:
    image.chmod(0o755)
    with mounted(image, raw):
        raw.chmod(0o600)
        os.chown(raw, 77, 88)
        status = raw.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o600, 77, 88)
    status = image.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o711, 77, 88)


def test_statfs_gives_the_cluster_size(tmp_path: Path, raw: Path) -> None:
    image = tmp_path / "big.qed"
    qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=2M", image, "64M")
    with mounted(image, raw):
        assert os.statvfs(raw).f_bsize == 2 * MIB


# -- options ----------------------------------------------------------------------------------------------------------


def test_owner_and_mode_can_be_overridden(image: Path, raw: Path) -> None:
    with mounted("-o", "uid=1111,gid=2222,umask=027", image, raw):
        status = raw.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 1111, 2222)
        with raises_errno(errno.EPERM):
            os.chown(raw, 1, 1)
        with raises_errno(errno.EPERM):
            raw.chmod(0o666)
    assert image.stat().st_uid == 0


@pytest.mark.parametrize("words", [["--ro"], ["-o", "ro"], ["-o", "rw", "-o", "ro,noatime,nofail,x-systemd.automount"]])
def test_read_only_writes_nothing(image: Path, raw: Path, words: list[str]) -> None:
    before = image.read_bytes()
    with mounted(*words, image, raw):
        assert stat.S_IMODE(raw.stat().st_mode) & 0o222 == 0
        assert raw.read_bytes()[:MIB] == b"\x11" * MIB
        for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC):
            with raises_errno(errno.EROFS):
                os.open(raw, flags)
        with raises_errno(errno.EROFS):
            os.truncate(raw, 0)
        with raises_errno(errno.EROFS):
            os.utime(raw)
        assert not os.access(raw, os.W_OK)
    assert image.read_bytes() == before


def test_an_image_that_cannot_be_written_is_shown_read_only(image: Path, raw: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to make a read-only bind mount")
    image.parent.joinpath("inner").mkdir()
    inner = image.rename(image.parent / "inner" / "disk.qed")
    directory = str(inner.parent)
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        with mounted(inner, raw) as mount:
            assert stat.S_IMODE(raw.stat().st_mode) == 0o444
            assert raw.stat().st_size == 64 * MIB
            assert raw.read_bytes()[:5] == b"\x11" * 5
            with raises_errno(errno.EROFS):
                raw.open("r+b")
            assert "shown read-only" in mount.text()
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.parametrize("option", ["direct_io", "fixed_size", "default_permissions", "allow_other", "noexec"])
def test_data_is_the_same_with_every_option(image: Path, raw: Path, option: str) -> None:
    with mounted("-o", option, image, raw):
        assert raw.stat().st_size == 64 * MIB
        with raw.open("r+b", buffering=0) as file:
            file.seek(20 * MIB + 3)
            file.write(b"hello" * 10_000)
            file.seek(20 * MIB)
            assert file.read(13) == bytes(3) + b"hellohello"
    qemu_io(image, f"read -P {ord('h')} {20 * MIB + 3} 1")
    check(image)


def test_fixed_size_forbids_growing_and_shrinking_at_once(image: Path, raw: Path) -> None:
    with mounted("-o", "fixed_size", image, raw):
        with raises_errno(errno.EPERM):
            os.truncate(raw, 0)
        with raises_errno(errno.EPERM):
            os.truncate(raw, 65 * MIB)
        os.truncate(raw, 64 * MIB)
        fd = os.open(raw, os.O_RDWR)
        try:
            with raises_errno(errno.ENOSPC):
                os.pwrite(fd, b"x" * 4096, 64 * MIB)
            assert os.fstat(fd).st_size == 64 * MIB
        finally:
            os.close(fd)
        done = subprocess.run(
            ["dd", "if=/dev/zero", f"of={raw}", "bs=1M", "seek=60", "conv=notrunc"], capture_output=True, check=False
        )
        assert b"No space left" in done.stderr
    check(image)


# -- size -------------------------------------------------------------------------------------------------------------


def test_the_file_grows_and_shrinks(image: Path, raw: Path) -> None:
    with mounted(image, raw):
        os.truncate(raw, 100 * MIB)
        assert raw.stat().st_size == 100 * MIB
        with raw.open("ab") as file:
            file.write(b"tail" * 256)
        assert raw.stat().st_size == 100 * MIB + 1024
        os.truncate(raw, 5 * MIB + 1)
        assert raw.stat().st_size == 5 * MIB + 1  # the image has whole sectors
        os.truncate(raw, 20 * MIB)
        with raw.open("rb") as file:
            assert file.read() == b"\x11" * MIB + bytes(19 * MIB)  # what was cut off does not come back
    check(image)
    assert json.loads(qemu_img("info", "--output=json", image))["virtual-size"] == 20 * MIB


def test_a_new_file_written_over_it_replaces_the_content(image: Path, raw: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.write_bytes(random.Random(3).randbytes(3 * MIB))
    with mounted(image, raw):
        subprocess.run(["cp", str(new), str(raw)], check=True)  # opens with O_TRUNC
        assert raw.stat().st_size == 3 * MIB
        subprocess.run(["cmp", str(new), str(raw)], check=True)
    check(image)
    flat = tmp_path / "flat"
    qemu_img("convert", "-O", "raw", image, flat)
    assert flat.read_bytes() == new.read_bytes()


def test_growing_past_what_the_geometry_maps_fails(tmp_path: Path, raw: Path) -> None:
    image = tmp_path / "small.qed"
    qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=4k,table_size=2", image, "1M")
    limit = 1024 * 1024 * 4096
    with mounted(image, raw):
        with raises_errno(errno.EFBIG):
            os.truncate(raw, limit + 512)
        os.truncate(raw, limit)
        assert raw.stat().st_size == limit
    check(image)


# -- odd, but allowed -------------------------------------------------------------------------------------------------


def test_o_sync_writes_are_durable(image: Path, raw: Path, tmp_path: Path) -> None:
    for number, options in enumerate(([], ["-o", "direct_io"])):
        offset = (40 + number) * MIB
        with mounted(*options, image, raw):
            fd = os.open(raw, os.O_WRONLY | os.O_DSYNC)
            try:
                os.pwrite(fd, b"d" * 4096, offset)
                copy = tmp_path / "copy.qed"
                copy.write_bytes(image.read_bytes())
            finally:
                os.close(fd)
        repair(copy)
        qemu_io(copy, f"read -P {ord('d')} {offset} 4096")


def test_as_fstab_calls_it(image: Path, raw: Path) -> None:
    options = "ro,noatime,dev,suid,noauto,nofail,x-systemd.requires=/"
    done = qedfuse(image, raw, "-o", options, "--log-file", raw.parent / "log")
    try:
        assert done == Result(0, "", ""), done
        assert raw.stat().st_size == 64 * MIB and stat.S_IMODE(raw.stat().st_mode) & 0o222 == 0
    finally:
        subprocess.run(["umount", str(raw)], check=True)


def test_a_caller_without_standard_files(image: Path, raw: Path) -> None:
    def close_them() -> None:
        for fd in (0, 1, 2):
            os.close(fd)

    done = qedfuse("mount", image, raw, preexec=close_them)
    try:
        assert done == Result(0, "", ""), done
        assert raw.stat().st_size == 64 * MIB
    finally:
        subprocess.run(["umount", str(raw)], check=True)


def test_names_of_any_kind(tmp_path: Path) -> None:
    need_fuse()
    directory = tmp_path / "a dir, with ä \\ and \udcff"
    directory.mkdir()
    image, raw = directory / "disk, ü\udcfe.qed", directory / "r,a w\n"
    qemu_img("create", "-q", "-f", "qed", tmp_path / "plain.qed", "1M")
    (tmp_path / "plain.qed").rename(image)
    raw.touch()
    with mounted(image, raw, "--log-file", tmp_path / "log") as mount:
        assert raw.stat().st_size == MIB
        assert is_mounted(raw)
        assert mount.umount().code == 0
    assert not is_mounted(raw)


def test_mmap_and_holes_in_the_middle(image: Path, raw: Path) -> None:
    import mmap

    with mounted(image, raw), raw.open("r+b") as file:
        with mmap.mmap(file.fileno(), 64 * MIB) as memory:
            assert memory[MIB - 1 : MIB + 1] == b"\x11\0"
            memory[50 * MIB : 50 * MIB + 4] = b"mmap"
            memory.flush()
        file.seek(50 * MIB)
        assert file.read(4) == b"mmap"
        file.close()
    qemu_io(image, f"read -P {ord('m')} {50 * MIB} 1")


def test_an_unclean_image_is_repaired_on_the_way(image: Path, raw: Path) -> None:
    content = bytearray(image.read_bytes())
    content[16] |= 2  # NEED_CHECK
    content += b"\xee" * 65536  # leaked
    image.write_bytes(content)
    with mounted(image, raw) as mount:
        assert raw.read_bytes()[:MIB] == b"\x11" * MIB
        assert "not closed cleanly" in mount.text()
    check(image)


# -- who holds the image ----------------------------------------------------------------------------------------------


def test_an_image_is_mounted_once(image: Path, raw: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.touch()
    with mounted(image, raw) as mount:
        one_line(qedfuse("mount", image, other), 1, str(image), "in use", f"pid {mount.pid()}")
        assert not is_mounted(other)
        one_line(qedfuse("mount", image, raw), 1, str(raw), "already a qedfuse mount")
        done = subprocess.run(
            ["qemu-io", "-f", "qed", "-c", "read 0 512", str(image)], capture_output=True, text=True, check=False
        )
        assert done.returncode != 0 and "lock" in done.stderr
        assert raw.stat().st_size == 64 * MIB
    qemu_io(image, "read 0 512")


def test_readers_share_an_image(image: Path, raw: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.touch()
    with mounted("--ro", image, raw), mounted("--ro", image, other):
        assert raw.read_bytes() == other.read_bytes()


# -- status -----------------------------------------------------------------------------------------------------------


def test_status(image: Path, raw: Path) -> None:
    with mounted(image, raw) as mount:
        with raw.open("r+b") as file:
            file.write(b"x")
            os.fsync(file.fileno())
        done = qedfuse("status", raw, "--output=json")
        assert done.code == 0
        answer = json.loads(done.out)
        assert answer["pid"] == mount.pid()
        assert answer["sources"] == [str(image)]
        assert answer["mountpoint"] == str(raw)
        assert not answer["read-only"]
        assert answer["images"][0]["filename"] == str(image)
        assert answer["images"][0]["virtual-size"] == 64 * MIB
        assert answer["requests"]["fsync"] >= 1
        shown = qedfuse("status", raw)
        assert shown.code == 0 and str(image) in shown.out and f"pid {mount.pid()}" in shown.out
    one_line(qedfuse("status", raw), 1, str(raw), "not a qedfuse mount")


def test_the_kernels_table_names_the_source(image: Path, raw: Path) -> None:
    with mounted(image, raw):
        found = subprocess.run(
            ["findmnt", "-n", "-o", "SOURCE,FSTYPE", "--target", str(raw)], capture_output=True, text=True, check=True
        )
        assert found.stdout.split() == [str(image), "fuse.qedfuse"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may do that")
def test_the_kernel_caches_as_much_as_for_a_disk(image: Path, raw: Path) -> None:
    with mounted(image, raw):
        device = raw.stat().st_dev
        limits = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
        assert ((limits / "strict_limit").read_text(), (limits / "max_ratio").read_text()) == ("0\n", "100\n")
