"""An image is replaced under open files, many times, while a guest and fio work on it: nothing is lost or fails."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import threading
from itertools import count
from pathlib import Path

import pytest

from qedfuse.daemon.control import Client
from tests.helpers.mounts.guests import (
    MKFS,
    assert_clean,
    checksums,
    filesystem,
    loop_device,
    make_tree,
    need_guest,
    run,
)
from tests.helpers.mounts.modes import MODES, Mode, answers_in_c, makes_holes
from tests.helpers.mounts.mounts import counters, mount_at, mounted, opened

MIB = 1 << 20
GUEST = 96 * MIB
#: Where fio works, and where one file descriptor reads and writes from the beginning to the end.
FIO, OWN = GUEST, GUEST + 32 * MIB
SIZE = OWN + MIB
TIMES = 20
BLOCK = 4096
BLOCKS = 64


def replace(point: Path) -> Path:
    """Have the daemon replace the image. Returns where its file is then."""
    mount = mount_at(point)
    assert mount is not None
    with Client(mount) as client:
        answer = client.ask("replace", 120)
    return Path(answer["path"])


class Fio:
    """Rounds of fio with verification, one after the other until `stop`."""

    def __init__(self, raw: Path, *, direct: bool) -> None:
        self.rounds = 0
        self._ending = threading.Event()
        self._problem = ""
        self._command = [
            *("fio", "--name=verify", f"--filename={raw}", "--rw=randwrite", "--bsrange=4k-64k", "--size=8M"),
            *(f"--offset={FIO}", "--offset_increment=16M", "--fsync=32", "--allow_file_create=0"),
            *("--verify=crc32c", "--do_verify=1", "--verify_backlog=64", "--verify_fatal=1", "--verify_state_save=0"),
            *(("--ioengine=libaio", "--iodepth=8", "--direct=1") if direct else ("--ioengine=psync",)),
            "--output=/dev/null",
        ]
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while not self._ending.is_set() and not self._problem:
            command = [*self._command, f"--randseed={self.rounds}", f"--numjobs={1 + self.rounds % 2}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
            self._problem = f"exit {done.returncode}: {done.stderr}" if done.returncode or done.stderr else ""
            self.rounds += 1

    @property
    def has_verified(self) -> bool:
        """A round has ended, in which it began with what an earlier one has left; or one has failed."""
        return self.rounds > 1 or bool(self._problem)

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()
        assert not self._problem


class Copier(threading.Thread):
    """Copies a tree into the guest, and trims. `problems`: what was said of it."""

    def __init__(self, source: Path, guest: Path, *, trims: bool) -> None:
        super().__init__()
        self.problems: list[str] = []
        self._source, self._guest, self._trims = source, guest, trims

    def run(self) -> None:
        for number in range(3):
            target = self._guest / f"copy{number % 2}"
            self._do("rm", "-rf", target)
            self._do("cp", "-a", self._source, target)
            self._do("sync", "-f", self._guest)
            if self._trims:
                self._do("fstrim", self._guest)

    def _do(self, *command: str | Path) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        if done.returncode:
            self.problems.append(f"{command[0]}: {done.stderr}")


class Reader(threading.Thread):
    """Reads and writes blocks by one descriptor: each is what was written there last, at any time."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.ending = threading.Event()
        self._fd = fd
        self._page = mmap.mmap(-1, BLOCK)
        self._blocks: list[bytes] = [bytes(BLOCK)] * BLOCKS
        self._random = random.Random(1)

    def run(self) -> None:
        for number in range(BLOCKS):
            self._write(number)
        while not self.ending.is_set():
            number = self._random.randrange(BLOCKS)
            os.preadv(self._fd, [self._page], OWN + number * BLOCK)
            if self._page[:] != self._blocks[number]:
                self.problems.append(f"block {number} is another one")
            self._write(number)
            if number == 0:
                os.fsync(self._fd)

    def _write(self, number: int) -> None:
        self._page[:] = self._blocks[number] = self._random.randbytes(BLOCK)
        os.pwrite(self._fd, self._page, OWN + number * BLOCK)


@pytest.mark.guest
@MODES
@pytest.mark.parametrize(("overlay", "direct"), [(False, False), (True, True)], ids=["plain", "overlay, direct"])
def test_under_fio_and_a_guest(tmp_path: Path, mode: Mode, overlay: bool, direct: bool) -> None:
    need_guest(MKFS["ext4"][0], "fio")
    images, raw, guest, source = (tmp_path / name for name in ("images", "disk.raw", "guest", "source"))
    images.mkdir()
    image = images / "disk.qed"
    backing = []
    if overlay:
        base = tmp_path / "base.raw"
        base.write_bytes(random.Random(3).randbytes(GUEST + 12 * MIB))
        backing = ["-b", str(base), "-F", "raw"]
    run("qemu-img", "create", "-q", "-f", "qed", "-o", "cluster_size=64k", *backing, image, str(SIZE))
    raw.touch()
    make_tree(source, seed=1, files=150)
    wanted = checksums(source)
    with (
        mounted(*mode, image, raw, foreground=True, module="tests.helpers.mounts.replacing"),
        loop_device(raw, f"--sizelimit={GUEST}") as loop,
    ):
        run(*MKFS["ext4"], loop)
        with filesystem(loop, guest), opened(raw, os.O_RDWR | os.O_DIRECT) as fd:
            fio = Fio(raw, direct=direct)
            try:
                image = work(raw, Copier(source, guest, trims=makes_holes(mode)), Reader(fd), fio)
            finally:
                fio.stop()
            if answers_in_c(mode):
                assert_answered_in_c(raw, fd)
        assert_holds(loop, guest, wanted)
    assert_clean(image, leaks=True)
    with mounted(image, raw), loop_device(raw, f"--sizelimit={GUEST}", "--read-only") as loop:
        assert_holds(loop, guest, wanted)


def work(raw: Path, copier: Copier, reader: Reader, fio: Fio) -> Path:
    """Replace the image while they work, `TIMES` times at least. Returns where it is in the end."""
    copier.start()
    reader.start()
    try:
        for number in count():
            path = replace(raw)
            if number >= TIMES - 1 and fio.has_verified:
                break
            if number % 4 == 0:
                copier.join(1)  # let it come further
    finally:
        copier.join()
        reader.ending.set()
        reader.join()
    assert not copier.problems
    assert not reader.problems
    return path


def assert_holds(loop: Path, guest: Path, wanted: dict[str, str]) -> None:
    with filesystem(loop, guest, "-o", "ro"):
        for number in range(2):
            assert checksums(guest / f"copy{number}") == wanted


def assert_answered_in_c(raw: Path, fd: int) -> None:
    page = mmap.mmap(-1, BLOCK)
    before = counters(raw)
    for number in range(BLOCKS):
        os.preadv(fd, [page], OWN + number * BLOCK)
        os.pwrite(fd, page, OWN + number * BLOCK)
    after = counters(raw)
    assert after["reads"] - before["reads"] >= BLOCKS
    assert after["writes"] - before["writes"] >= BLOCKS
