"""One image of the differential test, from round to round: mounted, worked on by several processes, killed or
unmounted, and compared with what they say that it must hold, by QEMU and by a new mount."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.cli import qedfuse
from tests.helpers.diff_disk import new_disk, new_model, qemu_writes
from tests.helpers.diff_team import Team, team
from tests.helpers.guests import assert_clean, run
from tests.helpers.kill_case import Killable
from tests.helpers.modes import NATIVE, PYTHON, Mode
from tests.helpers.mounts import Mounted, abort
from tests.helpers.shadow import SECTOR
from tests.helpers.victims import kill_daemon

#: Not yet: see issue 10, C4.
RESIZE = False
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
        if self.place == "file":
            self.raw.touch()
            words: tuple[str | Path, ...] = (self.image, self.raw)
        else:
            point = directory / "mnt"
            point.mkdir()
            self.raw = point / "disk.raw"
            words = (self.image if self.place == "directory" else images, point)
        self.words = (*(("-o", self.options) if self.options else ()), *words)
        native = mode == "native"
        self.able = ["holes"] * native + ["map"] * (self.options != "direct_io")
        self.able += ["size"] * (self.options != "fixed_size")
        self.able += ["rwf"] * (mode != "python" or self.options != "direct_io")
        self.workers = rnd.choice((2, 3, 4))
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
        how = self.random.choice(("kill", "kill", "kill closing", "umount", "umount", "umount"))
        how = {0: "umount", 1: "kill"}.get(number, how)
        order = {"do": "work", "seed": f"{self.seed}/{number}", "count": count}
        with self.mounted() as mount:
            writers.all(do="open", path=str(self.raw), size=writers.size, able=self.able)
            if how == "kill":
                writers.begin(**order)
                time.sleep(self.random.uniform(0, 0.6) ** 2 * 4)
                kill_daemon(mount)
                self.kills += 1
                writers.finish(may_fail=True)
                writers.begin(do="close")
                writers.finish(may_fail=True)
                self.bury(mount)
            else:
                writers.all(**order)
                if how == "kill closing" or self.random.random() < 0.4:
                    writers.all(do="sync")
                writers.compare(self.random.randrange(self.workers))
                writers.all(do="close")
                if how == "kill closing":
                    self.kill_closing(mount)
                    self.leaky |= self.overlay
        if how == "umount":
            size = -(-writers.size // SECTOR) * SECTOR
            writers.all(do="closed", size=size)
            self._compare(writers)
            assert_clean_of(self, leaks=self.leaky)
            self._by_others(writers)
        else:
            self.leaky = True
            self.judge(lambda: self._settle(writers))
            self._compare(writers)

    def _settle(self, writers: Team) -> None:
        size = self.raw.stat().st_size
        writers.all(do="open", path=str(self.raw), size=size, able=self.able)
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
            with self.model.open("r+b") as file:
                for offset, data in qemu_writes(self.image, self.random, writers.size):
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


def assert_clean_of(case: DiffCase, *, leaks: bool) -> None:
    if case.disk.qemu:
        assert_clean(case.image, leaks=leaks)
    else:
        done = qedfuse("check", case.image)
        assert done.code in ((0, 3) if leaks else (0,)), done
