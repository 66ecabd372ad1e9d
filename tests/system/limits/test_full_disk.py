"""The host's file system is full: who writes is told so, and nothing that was acknowledged is lost."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.mounts.guests import assert_clean, filesystem, loop_device, need_guest, run
from tests.helpers.mounts.modes import MODES, NATIVE, Mode
from tests.helpers.mounts.mounts import Mounted, find_daemon, mounted
from tests.helpers.mounts.victims import kill_daemon
from tests.helpers.qemu.cli import Result, qedfuse

KIB, MIB = 1 << 10, 1 << 20
HOST = 12 * MIB
SIZE = 32 * MIB
BALLAST = 2 * MIB
BLOCK = 58 * KIB  # neighbours share clusters
SECTOR = 512

HOSTS = pytest.mark.parametrize("host", ["ext4", "tmpfs"], indirect=True)
IMAGES = pytest.mark.parametrize("overlay", [False, True], ids=["plain", "overlay"])


@pytest.fixture
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system."""
    need_guest("mkfs.ext4")
    if request.param == "tmpfs":
        with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs", "-o", f"size={HOST}") as point:
            yield point
        return
    disk = tmp_path / "host.raw"
    with disk.open("wb") as file:
        file.truncate(HOST)
    run("mkfs.ext4", "-q", "-m", "0", disk)
    with loop_device(disk) as loop, filesystem(loop, tmp_path / "host") as point:
        yield point


class Disk:
    """An image on a small file system, and what each of its blocks may hold, the newest last."""

    def __init__(self, host: Path, directory: Path, mode: Mode, *, overlay: bool) -> None:
        self.image = host / "disk.qed"
        self.raw = directory / "disk.raw"
        self.raw.touch()
        self.copy = directory / "copy.raw"
        self._mode = mode
        self._random = random.Random(11)
        self._fresh = list(range(SIZE // BLOCK))
        self._random.shuffle(self._fresh)
        self._blocks: dict[int, list[bytes]] = {}
        self._base = b""
        options = []
        if overlay:
            self._base = self._random.randbytes(SIZE * 3 // 4)
            base = directory / "base.raw"
            base.write_bytes(self._base)
            options = ["-b", str(base), "-F", "raw"]
        geometry = "cluster_size=4k,table_size=2"  # a new table every 4 MiB
        run("qemu-img", "create", "-q", "-f", "qed", "-o", geometry, *options, self.image, str(SIZE))
        for number in range(2):
            (host / f"ballast{number}").write_bytes(b"b" * BALLAST)

    @contextmanager
    def mounted(self) -> Iterator[Mounted]:
        with mounted(*self._mode, self.image, self.raw) as mount:
            yield mount
        assert "Traceback" not in mount.text() and "internal error" not in mount.text(), mount.text()

    def write(self, count: int, flags: int = 0) -> int:
        """Write so many blocks, with an fsync for each. Returns how many were acknowledged; others were ENOSPC."""
        return sum(self._put(self._fresh.pop(), flags) for _ in range(count))

    def overwrite(self, count: int) -> int:
        """The same, on blocks that have been acknowledged."""
        known = [block for block, versions in self._blocks.items() if len(versions) == 1]
        return sum(self._put(block, 0) for block in self._random.sample(known, count))

    def write_only(self, count: int) -> list[int]:
        """Write so many blocks past the kernel's cache, without an fsync. Returns which were written."""
        blocks = [self._fresh.pop() for _ in range(count)]
        return [block for block in blocks if self._put(block, os.O_DIRECT, sync=False)]

    def acknowledge(self, blocks: Iterable[int]) -> None:
        """What was written is safe."""
        for block in blocks:
            del self._blocks[block][:-1]

    def fill(self, flags: int = 0) -> None:
        """Write until the disk is full, and a little longer."""
        acknowledged = 0
        while self.write(1, flags):
            acknowledged += 1
        assert acknowledged > 10
        self.write(20, flags)

    def _put(self, block: int, flags: int, *, sync: bool = True) -> bool:
        versions = self._blocks.setdefault(block, [self._original(block)])
        data = self._random.randbytes(BLOCK)
        versions.append(data)
        fd = os.open(self.raw, os.O_RDWR | flags)
        try:
            done = 0
            while done < BLOCK:
                done += os.pwrite(fd, data[done:], block * BLOCK + done)
            if sync:
                os.fsync(fd)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
        finally:
            os.close(fd)
        if sync:
            self.acknowledge([block])
        return True

    def _original(self, block: int) -> bytes:
        return self._base[block * BLOCK : (block + 1) * BLOCK].ljust(BLOCK, b"\0")

    def judge(self, path: Path) -> None:
        """`path` shows what was acknowledged, and of the rest, sector by sector, what it was or what was written."""
        with path.open("rb") as file:
            for block, versions in self._blocks.items():
                file.seek(block * BLOCK)
                found = file.read(BLOCK)
                for start in range(0, BLOCK, SECTOR) if found != versions[-1] else ():
                    choice = [version[start : start + SECTOR] for version in versions]
                    assert found[start : start + SECTOR] in choice, f"{path}: block {block} + {start}: {len(versions)}"
            for block in self._fresh[:100]:
                file.seek(block * BLOCK)
                assert file.read(BLOCK) == self._original(block), f"block {block}"

    def judge_all(self, *, leaks: bool = False) -> None:
        """By our own mount and by QEMU, after a clean close."""
        assert_clean(self.image, leaks=leaks)
        run("qemu-img", "convert", "-f", "qed", "-O", "raw", self.image, self.copy)
        self.judge(self.copy)
        with self.mounted():
            self.judge(self.raw)


@HOSTS
@IMAGES
@MODES
def test_a_full_disk_is_enospc_and_goes_on_with_space(tmp_path: Path, host: Path, mode: Mode, overlay: bool) -> None:
    disk = Disk(host, tmp_path, mode, overlay=overlay)
    with disk.mounted() as mount:
        pid = find_daemon(mount.point)
        for number, flags in enumerate((os.O_DIRECT, 0)):
            disk.fill(flags)
            disk.judge(disk.raw)
            disk.overwrite(10)
            (host / f"ballast{number}").unlink()
            assert disk.write(20, flags) == 20
            assert disk.overwrite(10) == 10
            disk.judge(disk.raw)
        assert find_daemon(mount.point) == pid
    disk.judge_all()


@pytest.mark.parametrize(("host", "overlay"), [("ext4", False), ("tmpfs", True)], indirect=["host"])
def test_closing_on_a_full_disk_tells_the_truth(tmp_path: Path, host: Path, overlay: bool) -> None:
    disk = Disk(host, tmp_path, NATIVE, overlay=overlay)
    with disk.mounted() as mount:
        assert disk.write(20) == 20
        written = disk.write_only(10)
        with _stopped(find_daemon(mount.point)):  # new tables wait in its memory, for a second
            _fill_up(host / "ballast2")
        done = mount.umount()
        if done != Result(0, "", ""):
            assert done.code == 1 and "not unmounted" in done.err and "o space left" in done.err, done
            disk.judge(disk.raw)
            (host / "ballast2").unlink()
            assert mount.umount() == Result(0, "", "")
            _fill_up(host / "ballast2")
        disk.acknowledge(written)
    reopen(disk, host)


@pytest.mark.parametrize(("host", "overlay"), [("tmpfs", False), ("ext4", True)], indirect=["host"])
def test_a_kill_on_a_full_disk_loses_nothing(tmp_path: Path, host: Path, overlay: bool) -> None:
    disk = Disk(host, tmp_path, NATIVE, overlay=overlay)
    with disk.mounted() as mount:
        disk.fill(os.O_DIRECT)
        disk.write_only(10)
        kill_daemon(mount)
        mount.umount()
    reopen(disk, host)


def reopen(disk: Disk, host: Path) -> None:
    """With a disk that is still full, then with space."""
    with disk.mounted():
        disk.judge(disk.raw)
        disk.overwrite(5)
        (host / "ballast0").unlink()
        assert disk.write(20) == 20
    disk.judge_all(leaks=True)
    done = qedfuse("check", "-r", "leaks", disk.image)
    assert done.code == 0, done
    disk.judge_all()


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _fill_up(path: Path) -> None:
    """Leave no space."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"b" * SECTOR)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
