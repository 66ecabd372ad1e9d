"""The daemon is killed, and everything that was acknowledged is there: on real mounts, with nobody's help.

A kill is no loss of power: what the daemon has written is in the host's page cache and stays. What a loss of power
leaves is enumerated in test_crash.py. `QEDFUSE_KILL_SEED` repeats a run's choices, but not its timing. Each of the slow
tests kills ten times, which makes 200 in all; `QEDFUSE_KILLS` sets another number.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.judges.ledger import Files, Ledger
from tests.helpers.mounts import filing
from tests.helpers.mounts.guests import filesystem, loop_device, need_filesystem, need_guest, run
from tests.helpers.mounts.kill_case import GEOMETRIES, IMAGES, KILLS, SEED, Case
from tests.helpers.mounts.modes import MODES, Mode, makes_holes
from tests.helpers.mounts.victims import victims
from tests.helpers.qemu.cli import TIMEOUT


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
