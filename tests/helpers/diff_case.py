"""One image of the differential test, from round to round: mounted, worked on by several processes, killed or
unmounted, and compared with what they say that it must hold, by QEMU and by a new mount."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import qedfuse
from tests.helpers.diff_deeds import PROFILES
from tests.helpers.diff_disk import MIB, new_disk, new_model, qemu_writes
from tests.helpers.diff_team import Team, team
from tests.helpers.guests import assert_clean, loop_device, run
from tests.helpers.kill_case import Killable
from tests.helpers.modes import NATIVE, PYTHON, Mode
from tests.helpers.mounts import Mounted, abort, wait_for_exit
from tests.helpers.shadow import SECTOR
from tests.helpers.victims import kill_daemon

#: Not yet: see issue 10, C4.
RESIZE = False
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
MODES: dict[str, Mode] = {"native": NATIVE, "python": PYTHON, "pass": NATIVE}


@dataclass
class Counts:
    """What was done in all."""

    cases: int = 0
    deeds: int = 0
    mounts: int = 0
    kills: int = 0
    sectors: int = 0
    mixed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.cases} images, {self.deeds} operations, {self.mounts} mounts, {self.kills} kills, "
            f"{self.sectors} sectors compared"
        ) + (f", {self.mixed} torn by a store" if self.mixed else "")


class DiffCase(Killable):
    """`mode` is one of MODES. All choices follow from `seed`."""

    def __init__(self, directory: Path, seed: int, mode: str, counts: Counts) -> None:
        rnd = random.Random(f"differential {seed}")
        images = directory / "images"
        images.mkdir()
        self.disk = new_disk(images, rnd)
        super().__init__(directory, MODES[mode], rnd, overlay=bool(self.disk.base))
        self.counts = counts
        self.image = self.disk.image
        self.model = directory / "model.raw"
        new_model(self.disk, self.model)
        self.options = rnd.choice(("", "", "", "direct_io", "direct_io", "fixed_size", "sync"))
        self.place = rnd.choice(("file", "directory", "source"))
        self.other: Path | None = None  # what another raw file of the mount holds
        if self.place == "file":
            self.raw.touch()
            words: tuple[str | Path, ...] = (self.image, self.raw)
        else:
            point = directory / "mnt"
            point.mkdir()
            self.raw = point / "disk.raw"
            self.other = directory / "other.raw"
            self.other.write_bytes(rnd.randbytes(MIB) + bytes(MIB) + rnd.randbytes(MIB))
            run("qemu-img", "convert", "-O", "qed", self.other, images / "other.qed")
            words = (self.image, images / "other.qed", point) if self.place == "directory" else (images, point)
        self.words = (*(("-o", self.options) if self.options else ()), *words)
        native = mode == "native"
        self.able = ["holes"] * native + ["map"] * (self.options != "direct_io")
        self.able += ["size"] * (self.options != "fixed_size")
        self.able += ["sync"] * (self.options == "sync")
        self.able += ["rwf"] * (native or self.options != "direct_io")
        self.workers = rnd.choice((2, 3, 4))
        self.may_loop = os.geteuid() == 0 and Path("/dev/loop-control").exists() and bool(shutil.which("losetup"))
        self.leaky = False
        self.seed = seed
        counts.cases += 1
        print(f"QEDFUSE_DIFFERENTIAL_SEED={seed}: {mode}, {self.place}, -o {self.options or '-'}, {self.disk}")

    @contextmanager
    def mounted(self) -> Iterator[Mounted]:
        self.counts.mounts += 1
        with super().mounted() as mount:
            try:
                yield mount
            except BaseException:
                abort(mount.point)
                raise

    def run(self, rounds: int, count: int) -> None:
        """So many rounds; in each of them every process does `count` things."""
        disk = self.disk
        with team(self.model, count=self.workers, tail=disk.tail, capacity=disk.capacity, size=disk.size) as writers:
            try:
                for number in range(rounds):
                    self._round(writers, number, count)
            finally:
                self.counts.deeds += writers.deeds
                self.counts.sectors += writers.sectors
                self.counts.mixed += sum(writers.mixed.values())
                self.counts.kills += self.kills

    def _round(self, writers: Team, number: int, count: int) -> None:
        how = self.random.choice(("kill", "kill", "kill closing", "terminate", "umount", "umount"))
        how = {0: "umount", 1: "kill"}.get(number, how)
        with self.mounted() as mount:
            with self._loop_device() as loop:
                try:
                    self._open(writers, loop, reopen=how != "terminate")
                    writers.begin(do="work", seed=f"{self.seed}/{number}", count=count, profile=self.profile())
                    if how == "kill":
                        self._kill_them(mount, writers)
                    else:
                        self._let_them_finish(mount, writers, terminate=how == "terminate")
                        if how == "umount" and not loop and self.random.random() < 0.3:
                            self._leave_alone(writers)
                        if how != "umount" or loop or self.random.random() < 0.4:
                            writers.all(do="sync")
                        writers.compare(0 if loop else self.random.randrange(self.workers))
                        writers.all(do="close")
                except BaseException:
                    abort(mount.point)
                    writers.close()  # or the loop device stays
                    raise
            if how == "kill":
                self.bury(mount)
            elif how == "kill closing":
                self.kill_closing(mount)
            elif how == "terminate":
                wait_for_exit(self._pid)
        if how.startswith("kill"):
            self.leaky = True
            self.judge(lambda: self._settle(writers))
            self._compare(writers)
        else:
            writers.all(do="closed", size=-(-writers.size // SECTOR) * SECTOR)
            self._compare(writers)
            self._assert_clean()
            self._by_others(writers)

    def profile(self) -> str:
        return self.random.choice(("all", *PROFILES))

    @contextmanager
    def _loop_device(self) -> Iterator[Path | None]:
        """One on the raw file, which the last process uses instead, in some of the rounds."""
        if self.may_loop and self.random.random() < 0.3:
            with loop_device(self.raw) as device:
                yield device
        else:
            yield None

    def _open(self, writers: Team, loop: Path | None, *, reopen: bool) -> None:
        order: dict[str, Any] = {"do": "open", "size": writers.size}
        able = self.able + ["reopen"] * reopen
        for number, member in enumerate(writers.members):
            if loop and number == self.workers - 1:
                can = [each for each in able if each in ("holes", "map", "reopen", "rwf")]
                can += ["discard"] * ("holes" in able)
                member.tell(**order, path=str(loop), able=can)
            else:
                source = [str(self.point / "other.raw"), str(self.other)] if self.other else None
                member.tell(
                    **order, path=str(self.raw), able=[*able, "file", *["source"] * bool(source)], source=source
                )
        writers.finish()

    def _kill_them(self, mount: Mounted, writers: Team) -> None:
        """In the middle of the work. Whatever they get to hear of it, and of closing their files afterwards."""
        time.sleep(self.random.uniform(0, 0.6) ** 2 * 4)
        kill_daemon(mount)
        self.kills += 1
        writers.finish(may_fail=True)
        writers.begin(do="close")
        writers.finish(may_fail=True)

    def _let_them_finish(self, mount: Mounted, writers: Team, *, terminate: bool) -> None:
        """Meanwhile the daemon is stopped for a moment now and then, or the host's page cache emptied. `terminate`: it
        is told to end, which it does with their last close."""
        self._pid = mount.pid()
        for _ in range(self.random.randrange(4)):
            time.sleep(self.random.uniform(0, 0.2))
            if self.random.random() < 0.7:
                os.kill(self._pid, signal.SIGSTOP)
                try:
                    time.sleep(self.random.uniform(0, 0.3))
                finally:
                    os.kill(self._pid, signal.SIGCONT)
            elif self.random.random() < 0.3 and os.access(DROP_CACHES, os.W_OK):
                DROP_CACHES.write_text("3")
        if terminate:
            os.kill(self._pid, signal.SIGTERM)
        writers.finish()

    def _leave_alone(self, writers: Team) -> None:
        """Everything is closed for a while: what a source directory shows may be closed, too, and is opened again."""
        writers.all(do="close")
        time.sleep(self.random.uniform(0, 1.6))
        self._open(writers, None, reopen=True)

    def _settle(self, writers: Team) -> None:
        size = self.raw.stat().st_size
        writers.all(do="open", path=str(self.raw), size=size, able=["reopen"])
        writers.all(do="settle", size=size)
        writers.all(do="close")

    def judge(self, verify: object) -> None:
        assert callable(verify)
        if self.disk.qemu:
            super().judge(verify)
            return
        with self.mounted():
            verify()
        done = qedfuse("check", self.image)
        assert done.code in (0, 3), done

    def _compare(self, writers: Team) -> None:
        """The image, as QEMU reads it, with the model."""
        flat = self._flat(self.image)
        with self.model.open("rb") as file:
            wanted = file.read(writers.size)
            assert not any(file.read()), "the model has something behind the end"
        self.counts.sectors += len(flat) // SECTOR
        if flat != wanted:
            assert len(flat) == len(wanted), f"the size is {len(flat)}, not {len(wanted)}"
            sectors = [
                place // SECTOR
                for place in range(0, len(flat), SECTOR)
                if flat[place : place + SECTOR] != wanted[place : place + SECTOR]
            ]
            pytest.fail(f"{len(sectors)} sectors are wrong: {sectors[:20]}\n{writers.stories(sectors[:3])}")

    def _flat(self, image: Path) -> bytes:
        if self.disk.qemu:
            return super()._flat(image)
        flat = self.directory / "flat.raw"
        done = qedfuse("convert", "-f", "qed", "-O", "raw", image, flat)
        assert done.code == 0, done
        return flat.read_bytes()

    def _by_others(self, writers: Team) -> None:
        """Between two mounts the image is QEMU's, or gets a tail that belongs to nothing."""
        choice = self.random.random()
        if choice < 0.3 and self.disk.qemu:
            align = self.disk.cluster if self.overlay else SECTOR
            with self.model.open("r+b") as file:
                for offset, data in qemu_writes(self.image, self.random, writers.size, align):
                    file.seek(offset)
                    file.write(data)
        elif RESIZE and choice < 0.45 and self.disk.qemu and writers.size < self.disk.capacity:
            writers.size = self.random.randrange(writers.size, self.disk.capacity + 1) // SECTOR * SECTOR
            run("qemu-img", "resize", "-q", "-f", "qed", self.image, str(writers.size))
            writers.all(do="closed", size=writers.size)
        elif choice < 0.55:
            with self.image.open("ab") as image:
                image.write(os.urandom(self.random.randrange(1, 5000)))
            self.leaky = True

    def _assert_clean(self) -> None:
        if self.disk.qemu:
            assert_clean(self.image, leaks=self.leaky)
        else:
            done = qedfuse("check", self.image)
            assert done.code in ((0, 3) if self.leaky else (0,)), done
