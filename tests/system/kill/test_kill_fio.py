"""The daemon is killed under fio, which then finds every block whose write it was told is durable.

fio writes each block of its part of the file once, in random order, and keeps in a state file how far it came; with
O_DSYNC a write that has returned must survive. `test_kill.py` has writers that overwrite, punch and meet in clusters.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from qedfuse.daemon.control import Client
from tests.helpers.mounts.kill_case import IMAGES, KILLS, Case
from tests.helpers.mounts.modes import MODES, NATIVE, Mode
from tests.helpers.mounts.mounts import is_mounted, mount_at, wait_until
from tests.helpers.mounts.victims import kill_daemon
from tests.helpers.qemu.cli import TIMEOUT

JOBS = 4
SIZE = 24 << 20


class Fio:
    """One pass over the file: what was written, and what of it is there."""

    def __init__(self, case: Case, directory: Path, *, direct: bool, block: str) -> None:
        directory.mkdir()
        self._directory = directory
        self._seed = case.random.randrange(1 << 30)
        share = SIZE // JOBS
        self._words = [
            *("fio", "--name=v", f"--filename={case.raw}", "--ioengine=psync", "--rw=randwrite", f"--bs={block}"),
            *(f"--size={share}", f"--offset_increment={share}", f"--numjobs={JOBS}", f"--direct={int(direct)}"),
            *("--sync=dsync", "--verify=crc32c", f"--randseed={self._seed}", "--output-format=json"),
        ]

    def start(self) -> subprocess.Popen[bytes]:
        words = [*self._words, "--do_verify=0", "--verify_state_save=1"]
        return subprocess.Popen(words, cwd=self._directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def verify(self) -> int:
        """The number of blocks that must be there and are. Raises CalledProcessError if any is not."""
        words = [*self._words, "--verify_only=1", "--verify_state_load=1"]
        done = subprocess.run(words, cwd=self._directory, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        report = json.loads(done.stdout[done.stdout.index("{") :])
        return sum(job["read"]["total_ios"] for job in report["jobs"])


def writes(raw: Path) -> int:
    """How many write requests the daemon has answered."""
    mount = mount_at(raw)
    assert mount is not None
    with Client(mount) as client:
        return int(client.ask("status")["requests"]["write"])


def kill_under_fio(case: Case, kills: int) -> None:
    if not shutil.which("fio"):
        pytest.skip("fio is not installed")
    blocks = 0
    while case.kills < kills:
        direct, block = case.random.random() < 0.5, case.random.choice(("4k", "4k", "16k", "128k"))
        fio = Fio(case, case.directory / f"fio{case.kills}", direct=direct, block=block)
        with case.mounted() as mount:
            with fio.start() as process:
                goal = case.random.choice((1, 20, 100, 400))
                wait_until(lambda goal=goal, fio=process: writes(case.raw) >= goal or fio.poll() is not None)
                time.sleep(case.random.uniform(0, 0.05))
                kill_daemon(mount)
                case.kills += 1
            case.bury(mount)
        found = 0

        def verify(fio: Fio = fio) -> None:
            nonlocal found
            found = fio.verify()

        case.judge(verify)
        blocks += found
    assert blocks
    with case.mounted():  # the verification can fail
        with case.raw.open("r+b") as file:
            file.write(bytes(SIZE))
        with pytest.raises(subprocess.CalledProcessError):
            fio.verify()
    assert not is_mounted(case.raw)
    print(f"figures: {case.kills} kills, {blocks} blocks verified")


def test_what_fio_has_synced_survives_a_kill(tmp_path: Path) -> None:
    kill_under_fio(Case(tmp_path, NATIVE, SIZE, overlay=True), 1)


@pytest.mark.slow
@pytest.mark.timeout(60 + 60 * KILLS)
@IMAGES
@MODES
def test_what_fio_has_synced_survives_many_kills(tmp_path: Path, mode: Mode, overlay: bool) -> None:
    kill_under_fio(Case(tmp_path, mode, SIZE, overlay=overlay), KILLS)
