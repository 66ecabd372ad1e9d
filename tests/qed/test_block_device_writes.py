"""A QED image on a block device, written: in place, into new clusters up to the device's end, repaired, locked."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_image
from qedfuse.host.file_storage import FileStorage
from tests.helpers.images.check_images import Builder, header_of
from tests.helpers.images.devices import device_with, qemu_is_refused
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.mounts import EXTRA_OPTIONS, mounted, wait_for_exit
from tests.helpers.qemu.cli import one_line, qedfuse, qemu_has_open, qemu_img, qemu_io

pytestmark = pytest.mark.guest

CLUSTER = 4096
MIB = 1 << 20


def make_image(path: Path, size: int, *options: str, cluster: int = CLUSTER) -> Path:
    words = ["-o", f"cluster_size={cluster},table_size=2", *options]
    qemu_img("create", "-q", "-f", "qed", *words, path, str(size))
    return path


def flat_of(image: Path, flat: Path) -> bytes:
    """What QEMU reads, which must not find anything wrong."""
    done = subprocess.run(["qemu-img", "check", "-f", "qed", image], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done  # it takes free space for leaks
    qemu_img("convert", "-f", "qed", "-O", "raw", image, flat)
    return flat.read_bytes()


def write_until_full(path: Path, offset: int, step: int) -> int:
    """Bytes that were written from `offset` on until there was no more space."""
    fd = os.open(path, os.O_RDWR)
    done = 0
    try:
        while True:
            os.pwrite(fd, b"%015d." % (offset + done) * (step // 16), offset + done)
            done += step
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.fsync(fd)
        return done
    finally:
        os.close(fd)


@pytest.mark.parametrize("sector", [512, 4096])
def test_up_to_the_end(tmp_path: Path, sector: int) -> None:
    """Writes go into new clusters until the device is full, and not a byte behind; QEMU reads what was written."""
    image, raw = make_image(tmp_path / "a.qed", 16 * MIB), tmp_path / "raw"
    qemu_io(image, "write -P 7 0 64k")
    raw.touch()
    size = 100 * CLUSTER + (sector if sector < CLUSTER else 0)
    with device_with(image, size, sector=sector) as device:
        with mounted("-o", "direct_io", device, raw) as mount:
            with raw.open("r+b", buffering=0) as file:
                assert file.read(64 << 10) == b"\7" * (64 << 10)
                file.seek(CLUSTER)
                file.write(b"in place" * 64)
            written = write_until_full(raw, MIB, CLUSTER)
            assert written == (100 - 3 - 2 - 16) * CLUSTER
            model = raw.read_bytes()
            assert model[MIB : MIB + 16] == b"%015d." % MIB
            assert model[MIB + written :].count(0) == 15 * MIB - written
            assert mount.umount().code == 0
        assert flat_of(device, tmp_path / "flat") == model
        assert qedfuse("check", device).code == 0
        with mounted("--ro", device, raw):
            assert raw.read_bytes() == model


def test_buffered(tmp_path: Path) -> None:
    """With the default cache, the defaults of the format, and more than what is zeroed at a time."""
    image, raw = make_image(tmp_path / "a.qed", 64 * MIB, cluster=65536), tmp_path / "raw"
    raw.touch()
    data = os.urandom(20 * MIB)
    with device_with(image, 40 * MIB) as device:
        with mounted(device, raw) as mount:
            with raw.open("r+b") as file:
                for number in range(20):
                    file.seek((2 * number + 1) * MIB)
                    file.write(data[number * MIB : (number + 1) * MIB])
                file.flush()
                os.fsync(file.fileno())
            assert mount.umount().code == 0
        flat = flat_of(device, tmp_path / "flat")
        for number in range(20):
            assert flat[2 * number * MIB : (2 * number + 1) * MIB] == bytes(MIB)
            assert flat[(2 * number + 1) * MIB : (2 * number + 2) * MIB] == data[number * MIB : (number + 1) * MIB]


def test_over_a_base(tmp_path: Path) -> None:
    """Copy-on-write of parts of clusters: stale bytes show up nowhere."""
    base, raw = tmp_path / "base.raw", tmp_path / "raw"
    raw.touch()
    base.write_bytes(os.urandom(MIB + 512))
    image = make_image(tmp_path / "a.qed", 2 * MIB, "-b", str(base), "-F", "raw")
    model = bytearray(base.read_bytes().ljust(2 * MIB, b"\0"))
    with device_with(image, MIB) as device:
        with mounted("-o", "direct_io", device, raw) as mount:
            with raw.open("r+b", buffering=0) as file:
                for number in range(100):
                    offset = number * 19 * 1024 + 512
                    file.seek(offset)
                    file.write(b"w" * 700)
                    model[offset : offset + 700] = b"w" * 700
                    if number % 10 == 0:
                        os.fsync(file.fileno())
            assert raw.read_bytes() == model
            assert mount.umount().code == 0
        assert flat_of(device, tmp_path / "flat") == model


def test_a_killed_daemon(tmp_path: Path) -> None:
    """NEED_CHECK is set; the next mount repairs it, and nothing that was synced is lost."""
    image, raw = make_image(tmp_path / "a.qed", 16 * MIB), tmp_path / "raw"
    raw.touch()
    with device_with(image, 2 * MIB) as device:
        with mounted(device, raw, foreground=True) as mount:
            pid = mount.pid()
            fd = os.open(raw, os.O_RDWR)
            os.pwrite(fd, b"synced" * 1000, MIB)
            os.fsync(fd)
            os.pwrite(fd, b"not synced" * 1000, 5 * MIB)
            os.kill(pid, signal.SIGKILL)
            wait_for_exit(pid)
            subprocess.run(["umount", "--lazy", str(raw)], check=False, capture_output=True)
            with suppress(OSError):
                os.close(fd)
        assert header_of(device.read_bytes()[:CLUSTER]).needs_check
        with mounted("-o", "direct_io", device, raw) as mount:
            with raw.open("r+b", buffering=0) as file:
                file.seek(MIB)
                assert file.read(6000) == b"synced" * 1000
                file.seek(9 * MIB)
                file.write(b"more" * 1024)
            assert "was not closed cleanly" in mount.text()
            assert mount.umount().code == 0
        assert flat_of(device, tmp_path / "flat")[MIB : MIB + 6000] == b"synced" * 1000


@pytest.mark.parametrize("repair", ["leaks", "all"])
def test_repair(tmp_path: Path, repair: str) -> None:
    """What is referenced twice gets a copy among the stale bytes; the device has no leaks to give back."""
    builder = Builder()
    table = builder.table(0)
    builder.data(table, 0, 1, 2)
    builder.junk(3)
    if repair == "all":
        builder.set_l1(1, table)
        builder.set_l2(table, 9, 1 << 40)
    image = builder.save(tmp_path / "a.qed")
    with device_with(image, MIB) as device:
        flat = flat_of(image, tmp_path / "flat") if repair == "leaks" else b""
        assert qedfuse("check", device).code == (0 if repair == "leaks" else 2)
        done = qedfuse("check", "-r", repair, device)
        assert done.code == 0, done
        assert flat_of(device, tmp_path / "flat")[: len(flat)] == flat
        assert qedfuse("check", device).code == 0
    if repair == "all":
        with device_with(image, len(builder.raw)) as device:
            before = device.read_bytes()
            one_line(qedfuse("check", "-r", "all", device), 1, str(device), "no space left")
            assert device.read_bytes() == before


def test_convert_into_an_image_there(tmp_path: Path) -> None:
    image, source = make_image(tmp_path / "a.qed", 4 * MIB), tmp_path / "source"
    source.write_bytes(os.urandom(MIB) + bytes(MIB) + os.urandom(MIB))
    with device_with(image, 3 * MIB) as device:
        assert qedfuse("convert", "-n", "-f", "raw", "-O", "qed", source, device).code == 0
        assert flat_of(device, tmp_path / "flat") == source.read_bytes() + bytes(MIB)
    with device_with(image, MIB) as device:
        done = qedfuse("convert", "-n", "-f", "raw", "-O", "qed", source, device)
        one_line(done, 1, str(device), "no space left")
        assert qedfuse("check", device).code == 0


def test_space_of_what_is_cut_off_is_used_again(tmp_path: Path) -> None:
    """Through the mount, without waiting and after a remount; QEMU agrees with what is read."""
    image, raw = make_image(tmp_path / "a.qed", 8 * MIB), tmp_path / "raw"
    raw.touch()
    with device_with(image, MIB) as device:
        for _ in range(2):
            with mounted("-o", "direct_io", device, raw) as mount:
                written = write_until_full(raw, 0, 64 << 10)
                assert written > 700_000
                os.truncate(raw, 64 << 10)
                os.truncate(raw, 8 * MIB)
                assert write_until_full(raw, 4 * MIB, 64 << 10) > 600_000
                model = raw.read_bytes()
                os.truncate(raw, 0)
                os.truncate(raw, 8 * MIB)
                assert mount.umount().code == 0
            assert flat_of(device, tmp_path / "flat") == bytes(8 * MIB)
        assert any(model)


def test_locks(tmp_path: Path) -> None:
    """QEMU and we keep each other from writing one device."""

    async def write(device: Path) -> None:
        async with open_image(device) as image:
            await image.write(0, b"x" * 512)
            assert await trio.to_thread.run_sync(qemu_is_refused, device)

    with device_with(make_image(tmp_path / "a.qed", MIB), MIB) as device:
        trio.run(write, device)
        assert not qemu_is_refused(device)
        with qemu_has_open(device):
            raw = tmp_path / "raw"
            raw.touch()
            one_line(qedfuse("mount", device, raw), 1, str(device), "in use by another process", "qemu-io")
            one_line(qedfuse("check", "-r", "all", device), 1, str(device), "in use by another process", "qemu-io")


def test_a_read_only_device(tmp_path: Path) -> None:
    """It is shown read-only, as a file that may not be written."""
    image, point = make_image(tmp_path / "a.qed", MIB), tmp_path / "point"
    point.mkdir()
    with device_with(image, MIB, read_only=True) as device:
        one_line(qedfuse("check", "-r", "all", device), 1, str(device), "read-only block device")
        with mounted(device, point) as mount:
            assert os.listdir(point) == [f"{device.name}.raw"]
            assert (point / f"{device.name}.raw").stat().st_mode & 0o222 == 0
            assert "shown read-only" in mount.text()


@pytest.mark.parametrize("exclusive", [False, True])
def test_zeroes(tmp_path: Path, exclusive: bool) -> None:
    """Whatever the edges, and also while somebody has the device exclusively, which makes discarding EBUSY."""
    size = 64 * CLUSTER + 512

    async def main(device: Path) -> None:
        storage = FileStorage.open(device, writable=True)
        model = bytearray(os.urandom(size))
        await storage.write(0, [model])
        for offset, length in ((0, CLUSTER), (5, 7), (4000, 200), (9000, 20_000), (size - 700, 700), (100_000, 65_536)):
            await storage.write(offset, [b"dirty" * (length // 5)])
            model[offset : offset + length // 5 * 5] = b"dirty" * (length // 5)
            await storage.punch(offset, length)
            model[offset : offset + length] = bytes(length)
        found = bytearray(size)
        await storage.read_into(0, memoryview(found))
        assert found == model
        await storage.sync()
        await storage.close()

    image = tmp_path / "a"
    image.write_bytes(b"")
    with device_with(image, size) as device:
        holder = os.open(device, os.O_RDONLY | os.O_EXCL) if exclusive else -1
        try:
            trio.run(main, device)
        finally:
            if exclusive:
                os.close(holder)


def test_discarding_what_the_kernel_still_has_to_write(tmp_path: Path) -> None:
    """While somebody has the device exclusively the kernel neither discards nor zeroes it (EBUSY). No cluster is given
    up for that: more is written and discarded than fits."""
    image = make_image(tmp_path / "a.qed", 8 * MIB)

    async def main(device: Path) -> None:
        async with open_image(device) as image:
            holder = os.open(device, os.O_RDONLY | os.O_EXCL)
            try:
                for fill in range(1, 5):
                    await image.write(0, bytes([fill]) * (4 * MIB))
                    await image.discard(0, 4 * MIB)
                    assert not any(await image.read(0, 4 * MIB))
            finally:
                os.close(holder)

    with device_with(image, 6 * MIB) as device:
        trio.run(main, device)


def test_space_as_the_guest_is_told(tmp_path: Path) -> None:
    """df is about the device, and preallocating more than fits is ENOSPC."""
    image, raw = make_image(tmp_path / "a.qed", 8 * MIB), tmp_path / "raw"
    raw.touch()
    with device_with(image, MIB) as device, mounted("-o", "direct_io", device, raw) as mount:
        written = write_until_full(raw, 0, 64 << 10)
        host = os.statvfs(raw)
        assert host.f_blocks * host.f_frsize == MIB
        assert host.f_bfree * host.f_frsize < 64 << 10
        os.truncate(raw, MIB // 2)
        os.truncate(raw, 8 * MIB)
        host = os.statvfs(raw)
        assert host.f_bavail * host.f_frsize >= written - MIB // 2
        if "--no-fastpath" not in EXTRA_OPTIONS and os.environ.get("QEDFUSE_FASTPATH") != "pass":
            fd = os.open(raw, os.O_RDWR)
            try:
                os.posix_fallocate(fd, MIB, 64 << 10)
                with raises_errno(errno.ENOSPC):
                    os.posix_fallocate(fd, 4 * MIB, 2 * MIB)
            finally:
                os.close(fd)
        assert mount.umount().code == 0
