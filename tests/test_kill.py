"""The daemon is killed, and everything that was acknowledged is there: on real mounts, with nobody's help.

A kill is no loss of power: what the daemon has written is in the host's page cache and stays. What a loss of power
leaves is enumerated in test_crash.py. `QEDFUSE_KILL_SEED` repeats a run's choices, but not its timing. Each of the slow
tests kills ten times, which makes 200 in all; `QEDFUSE_KILLS` sets another number.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers import filing
from tests.helpers.cli import TIMEOUT, environment, qedfuse
from tests.helpers.guests import (
    assert_clean,
    filesystem,
    loop_device,
    need_filesystem,
    need_guest,
    qemu_check,
    run,
)
from tests.helpers.ledger import Files, Ledger
from tests.helpers.modes import MODES, Mode, makes_holes
from tests.helpers.mounts import Mounted, is_mounted, mounted, need_fuse, wait_until
from tests.helpers.victims import Victims, kill_daemon, kill_process, victims

SEED = int(os.environ.get("QEDFUSE_KILL_SEED") or random.SystemRandom().randrange(1 << 32))

#: In each slow test.
KILLS = int(os.environ.get("QEDFUSE_KILLS") or 10)

#: Cluster size and table size. Small ones make many tables.
GEOMETRIES = (("4k", "2"), ("4k", "4"), ("64k", "4"), ("256k", "2"))

IMAGES = pytest.mark.parametrize("overlay", [False, True], ids=["plain", "overlay"])


class Case:
    """One image, on its way from kill to kill."""

    def __init__(
        self, directory: Path, mode: Mode, size: int, *, overlay: bool, geometry: tuple[str, str] | None = None
    ) -> None:
        need_fuse()
        self.mode = mode
        self.overlay = overlay
        self.random = random.Random(f"{SEED}/{mode}/{overlay}/{geometry}")
        self.directory = directory
        self.image = directory / "disk.qed"
        self.raw = directory / "disk.raw"
        self.raw.touch()
        self.kills = 0
        cluster, table = geometry or self.random.choice(GEOMETRIES)
        options = ["-o", f"cluster_size={cluster},table_size={table}"]
        base = b""
        if overlay:
            base = self.random.randbytes(size * 3 // 4)
            (directory / "base.raw").write_bytes(base)
            options += ["-b", str(directory / "base.raw"), "-F", "raw"]
        run("qemu-img", "create", "-q", "-f", "qed", *options, self.image, str(size))
        self.base = base.ljust(size, b"\0")
        print(f"QEDFUSE_KILL_SEED={SEED}: {self.image}, clusters of {cluster}, tables of {table}")

    @contextmanager
    def mounted(self) -> Iterator[Mounted]:
        with mounted(*self.mode, self.image, self.raw) as mount:
            yield mount
        assert "Traceback" not in mount.text() and "internal error" not in mount.text(), mount.text()

    def kill(self, mount: Mounted, writers: Victims) -> None:
        """Kill it, and wait for the writers to learn of it (the kernel has several errnos for that)."""
        assert not writers.failures, writers.failures
        kill_daemon(mount)
        self.kills += 1
        writers.join()

    def bury(self, mount: Mounted) -> None:
        """After a kill: unmount what is dead, as a user would."""
        if is_mounted(self.raw):
            done = mount.umount()
            assert done.code == 1 and "its daemon does not answer" in done.err, done

    def kill_closing(self, mount: Mounted) -> None:
        """Kill it while it flushes and closes the image, between the end of the mount and its own."""
        pid = mount.pid()
        with subprocess.Popen(
            [sys.executable, "-m", "qedfuse", "umount", str(self.raw)], env=environment(), stderr=subprocess.DEVNULL
        ) as umount:
            wait_until(lambda: not is_mounted(self.raw))
            time.sleep(self.random.uniform(0, 0.02))
            try:
                kill_process(pid)
                self.kills += 1
            except ProcessLookupError:
                pass
            umount.wait(TIMEOUT)
        self.bury(mount)

    def kill_opening(self) -> None:
        """Kill a daemon that is just opening (perhaps repairing) the image, mounting it, or has done so."""
        command = [sys.executable, "-m", "qedfuse", "mount", "-f", *self.mode, str(self.image), str(self.raw)]
        with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as daemon:
            time.sleep(self.random.uniform(0.15, 0.5))
            daemon.kill()
        assert daemon.returncode == -signal.SIGKILL, daemon.returncode
        while is_mounted(self.raw):
            subprocess.run(["umount", "-l", str(self.raw)], check=True, timeout=TIMEOUT)
        self.kills += 1

    def judge(self, verify: Callable[[], None]) -> None:
        """What a crash has left: QEMU's opinion first, then ours, and they must be the same. `verify` looks into the
        raw file, mounted, and may change it.

        Clusters that were written but not committed yet have leaked; where NEED_CHECK says so, opening gives them back.
        """
        crashed = self.directory / "crashed.qed"
        run("cp", "--sparse=always", self.image, crashed)
        marked = json.loads(run("qemu-img", "info", "-f", "qed", "--output=json", crashed))["dirty-flag"]
        assert not (marked and self.overlay)
        if self.overlay:
            assert qemu_check(crashed).get("corruptions", 0) == 0, f"{crashed}: corrupt before any repair"
        else:
            subprocess.run(["qemu-img", "check", "-q", "-r", "all", str(crashed)], check=False, timeout=TIMEOUT)
        theirs = self._flat(crashed)
        if self.random.random() < 0.3:
            self.kill_opening()
        with self.mounted():
            assert self.raw.read_bytes() == theirs, f"{crashed}: QEMU reads it differently"
            verify()
            ours = self.raw.read_bytes()
        assert_clean(self.image, leaks=not marked)
        assert self._flat(self.image) == ours, f"{self.image}: QEMU reads it differently"
        if not marked and self.random.random() < 0.5:
            done = qedfuse("check", "-r", "leaks", self.image)
            assert done.code == 0, done
            assert_clean(self.image)

    def _flat(self, image: Path) -> bytes:
        flat = self.directory / "flat.raw"
        run("qemu-img", "convert", "-f", "qed", "-O", "raw", image, flat)
        return flat.read_bytes()


def kill_under_writers(case: Case, kills: int, *, lulls: bool) -> None:
    """`lulls`: now and then, wait before the kill for what the daemon does when it is left alone."""
    ledger = Ledger(SEED, case.base)
    while case.kills < kills:
        with case.mounted() as mount, victims() as writers:
            writers.write(case.raw, ledger, holes=makes_holes(case.mode))
            writers.wait_for(lambda: ledger.acknowledged, case.random.choice((1, 20, 60, 150)))
            what = case.random.choice(("writing", "writing", "writing", "closing", "lull"))
            if what == "closing":
                writers.stop()
                case.kill_closing(mount)
            else:
                if what == "lull" and lulls:
                    writers.stop()
                    time.sleep(case.random.uniform(0, 6))
                else:
                    time.sleep(case.random.uniform(0, 0.05))
                case.kill(mount, writers)
                case.bury(mount)
        case.judge(lambda: ledger.settle(case.raw.read_bytes()))
    print(f"figures: {case.kills} kills, {ledger.acknowledged} acknowledged writes")


@IMAGES
@MODES
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, mode: Mode, overlay: bool) -> None:
    kill_under_writers(Case(tmp_path, mode, 16 << 20, overlay=overlay), 2, lulls=False)


@pytest.mark.slow
@pytest.mark.timeout(60 + 60 * KILLS)
@IMAGES
@MODES
@pytest.mark.parametrize("geometry", GEOMETRIES, ids="-".join)
def test_what_was_acknowledged_survives_many_kills(
    tmp_path: Path, geometry: tuple[str, str], mode: Mode, overlay: bool
) -> None:
    kill_under_writers(Case(tmp_path, mode, 32 << 20, overlay=overlay, geometry=geometry), KILLS, lulls=True)


# -- a guest's file system ---------------------------------------------------------------------------------------------


def kill_under_guest(case: Case, kills: int) -> None:
    """An ext4 on a loop device: its journal brings everything back that was fsynced in it."""
    guest = case.directory / "guest"
    size = 12 << 20
    ledger, files = Ledger(SEED, bytes(size)), Files(SEED)

    def settle() -> None:
        with loop_device(case.raw) as loop:
            if case.random.random() < 0.3:
                repair = subprocess.run(["e2fsck", "-fp", str(loop)], capture_output=True, text=True, timeout=TIMEOUT)
                assert repair.returncode in (0, 1), repair  # 1: the journal was replayed
            with filesystem(loop, guest):
                ledger.settle((guest / "disk").read_bytes())
                files.settle(guest / "files")
            run("e2fsck", "-fn", loop)

    with case.mounted(), loop_device(case.raw) as loop:
        run("mkfs.ext4", "-q", "-F", loop)
        with filesystem(loop, guest):
            (guest / "files").mkdir()
            with (guest / "disk").open("wb") as disk:
                disk.truncate(size)
    while case.kills < kills:
        options = case.random.choice(([], ["--direct-io=on"]))
        goal = case.random.choice((10, 40, 100))
        with case.mounted() as mount, victims() as writers:
            with loop_device(case.raw, *options) as loop, filesystem(loop, guest):
                writers.write(guest / "disk", ledger, holes=True)
                for number in range(3):
                    words = (guest / "files", SEED, f"{case.kills}{number}")
                    writers.start(filing.__file__, *words, hear=files.hear)
                writers.wait_for(lambda: ledger.acknowledged, goal)
                writers.wait_for(lambda: files.count, goal)
                case.kill(mount, writers)
            case.bury(mount)
        case.judge(settle)
    print(f"figures: {case.kills} kills, {ledger.acknowledged} acknowledged writes, {files.count} acknowledged files")


@pytest.mark.guest
@IMAGES
@MODES
def test_what_a_guest_has_fsynced_survives_a_kill(tmp_path: Path, mode: Mode, overlay: bool) -> None:
    need_guest("mkfs.ext4", "e2fsck")
    need_filesystem("ext4")
    kill_under_guest(Case(tmp_path, mode, 64 << 20, overlay=overlay), 1)


@pytest.mark.slow
@pytest.mark.guest
@pytest.mark.timeout(60 + 60 * KILLS)
@IMAGES
@MODES
def test_what_a_guest_has_fsynced_survives_many_kills(tmp_path: Path, mode: Mode, overlay: bool) -> None:
    need_guest("mkfs.ext4", "e2fsck")
    need_filesystem("ext4")
    kill_under_guest(Case(tmp_path, mode, 64 << 20, overlay=overlay), KILLS)
