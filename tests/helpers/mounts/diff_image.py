"""One image of the differential test: how it is mounted, what its processes say that it must hold, and the judges."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.judges.shadow import SECTOR
from tests.helpers.mounts.diff_disk import MIB, new_disk, new_model, qemu_writes
from tests.helpers.mounts.diff_team import Team
from tests.helpers.mounts.guests import assert_clean, run
from tests.helpers.mounts.kill_case import Killable
from tests.helpers.mounts.modes import NATIVE, OPENS_DIRECTLY, PYTHON, Mode
from tests.helpers.mounts.mounts import Mounted, abort
from tests.helpers.qemu.cli import qedfuse

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


class DiffImage(Killable):
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
            below = self.disk.below
            if self.place == "source" and below and below.parent == images and below.suffix == ".qed":
                other = below  # the base itself is shown
                run("qemu-img", "convert", "-f", "qed", "-O", "raw", below, self.other)
            else:
                other = images / "other.qed"
                self.other.write_bytes(rnd.randbytes(MIB) + bytes(MIB) + rnd.randbytes(MIB))
                run("qemu-img", "convert", "-O", "qed", self.other, other)
            self.other_raw = point / f"{other.stem}.raw"
            words = (self.image, other, point) if self.place == "directory" else (images, point)
        self.words = (*(("-o", self.options) if self.options else ()), *words)
        native = mode == "native"
        self.able = ["holes"] * native + ["map"] * (self.options != "direct_io" or (native and OPENS_DIRECTLY))
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

    def judge(self, verify: Callable[[], None]) -> None:
        if self.disk.qemu:
            super().judge(verify)
            return
        with self.mounted():
            verify()
        done = qedfuse("check", self.image)
        assert done.code in (0, 3), done

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
            self._qemu_writes(writers)
        elif choice < 0.45 and self.disk.qemu and self.disk.base_size <= writers.size < self.disk.capacity:
            # (QEMU cannot hide what a larger base has there, and refuses.)
            writers.size = self.random.randrange(writers.size, self.disk.capacity + 1) // SECTOR * SECTOR
            run("qemu-img", "resize", "-q", "-f", "qed", self.image, str(writers.size))
            writers.all(do="closed", size=writers.size)
        elif choice < 0.55:
            with self.image.open("ab") as image:
                image.write(os.urandom(self.random.randrange(1, 5000)))
            self.leaky = True

    def _qemu_writes(self, writers: Team) -> None:
        align = self.disk.cluster if self.overlay else SECTOR
        with self.model.open("r+b") as file:
            for offset, data in qemu_writes(self.image, self.random, writers.size, align):
                file.seek(offset)
                file.write(data)

    def _assert_clean(self) -> None:
        if self.disk.qemu:
            assert_clean(self.image, leaks=self.leaky)
        else:
            done = qedfuse("check", self.image)
            assert done.code in ((0, 3) if self.leaky else (0,)), done
