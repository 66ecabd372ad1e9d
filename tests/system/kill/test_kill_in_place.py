"""A conversion in place is killed at each of its system calls that change anything: the file is the old image or the
new one, and from there the same command finishes it, and in a second run --undo takes it back.

A kill is no loss of power: what that leaves is enumerated in `test_in_place_crash.py`.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qedfuse.chain.unfinished import SUFFIX, Step, read_journal
from qedfuse.cli.main import main
from tests.helpers.images.conversions import MIB, scatter
from tests.helpers.images.qcow2_images import create
from tests.helpers.images.qcow2_images import qemu_io as qcow2_io
from tests.helpers.mounts.guests import assert_clean
from tests.helpers.qemu.cli import TIMEOUT, environment, qedfuse, qemu_img

#: What changes the file or the journal, or makes it durable.
CALLS = ("openat", "pwrite64", "pwritev", "fallocate", "ftruncate", "fdatasync", "fsync", "write", "rename", "unlink")
#: Those before the first of them that matters are Python's own; an openat counts from the first on the file.
MOST = 60


@dataclass
class Case:
    """`old` becomes `target`, and reads as `flat`."""

    old: Path
    flat: Path
    source: str
    target: str

    @property
    def words(self) -> list[str]:
        return ["convert", "--in-place", "-f", self.source, "-O", self.target]


def raw_case(directory: Path) -> Case:
    old = directory / "old"
    with old.open("wb") as file:
        file.truncate(2 * MIB + 512)
    scatter(old, "raw", 2 * MIB, seed=1)
    return Case(old, old, "raw", "qed")


def qed_case(directory: Path, *, moves: bool) -> Case:
    """Back from what a raw disk has become, used since then, and perhaps grown, so that clusters must move."""
    case = raw_case(directory)
    old, flat = directory / "old.qed", directory / "flat"
    shutil.copy(case.old, old)
    assert main([*case.words, str(old)]) == 0
    size = 4 * MIB if moves else 2 * MIB
    if moves:
        qemu_img("resize", "-q", "-f", "qed", old, size)
    scatter(old, "qed", size, seed=2)
    qemu_img("convert", "-f", "qed", "-O", "raw", old, flat)
    return Case(old, flat, "qed", "raw")


def qcow2_case(directory: Path) -> Case:
    """Everything but a backing file."""
    old, flat = create(directory / "old.qcow2", 4 * MIB), directory / "flat"
    qcow2_io(old, "write -c -P 3 1M 64k", "write -c -P 4 3M 128k", "write -P 1 100k 300k", "write -z 2M 128k")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", old, flat)
    return Case(old, flat, "qcow2", "qed")


CASES: dict[str, Callable[[Path], Case]] = {
    "from raw": raw_case,
    "back to raw": lambda directory: qed_case(directory, moves=False),
    "back with moves": lambda directory: qed_case(directory, moves=True),
    "from qcow2": qcow2_case,
}


def kill_at(case: Case, path: Path, call: str, number: int) -> bool:
    """Run the command on a copy at `path`, and kill it as it begins its n-th call of this kind on the file or beside
    it. Returns whether it came so far."""
    shutil.copy(case.old, path)
    paths = [path, f"{path}{SUFFIX}", f"{path}{SUFFIX}.new", path.parent]
    command = ["strace", "-f", "-o", "/dev/null", *[word for each in paths for word in ("-P", str(each))]]
    command += [
        "-e",
        f"inject={call}:signal=KILL:when={number}",
        sys.executable,
        "-m",
        "qedfuse",
        *case.words,
        str(path),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=TIMEOUT, check=False)
    assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done
    return done.returncode != 0


def judge(case: Case, path: Path, *, undo: bool) -> str:
    """What a kill has left, and what comes of it. Returns how far it was."""
    found = read_journal(f"{path}{SUFFIX}")
    is_old = (path.read_bytes()[:4] == b"QED\0") == (case.source == "qed")
    assert same(case, path, case.source if is_old else case.target)
    where = "no journal" if found is None else found.step.value
    if found is None and not is_old:
        return "done"
    if found is None and undo:
        return where
    done = qedfuse(*case.words, *(["--undo"] if undo else []), path)
    if undo and found is not None and found.step is Step.FINISH:
        assert done.code == 1 and "only finished" in done.err, done
        assert qedfuse(*case.words, path).code == 0
        undo = False
    else:
        assert done.code == 0, done
    assert read_journal(f"{path}{SUFFIX}") is None
    assert same(case, path, case.source if undo else case.target)
    if undo and case.source != "qed":
        assert path.read_bytes() == case.old.read_bytes()
    if not undo and case.target == "raw":
        assert path.read_bytes() == case.flat.read_bytes()
    if (case.source if undo else case.target) == "qed":
        assert_clean(path, leaks=undo)
    return where


def same(case: Case, path: Path, format: str) -> bool:
    """Whether it reads as it must, for QEMU. A raw disk may have a longer tail."""
    if format == "raw":
        flat = case.flat.read_bytes()
        return path.read_bytes()[: len(flat)] == flat
    qemu_img("check", "-f", format, path, status=(0, 3))
    qemu_img("compare", "-f", format, "-F", "raw", path, case.flat)
    return True


def every_call() -> Iterator[tuple[str, int]]:
    for call in CALLS:
        for number in range(1, MOST):
            yield call, number


def need_strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")


@pytest.mark.parametrize("undo", [False, True], ids=["finished", "undone"])
@pytest.mark.parametrize("name", CASES)
def test_killed_at_some_calls(tmp_path: Path, name: str, undo: bool) -> None:
    need_strace()
    case = CASES[name](tmp_path)
    seen = set()
    for call, number in [("pwrite64", 1), ("rename", 3)]:  # the third change of the journal follows the switch
        path = tmp_path / f"{call}-{number}"
        assert kill_at(case, path, call, number)
        seen.add(judge(case, path, undo=undo))
    assert seen == {Step.TAIL.value, Step.SWITCH.value}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("undo", [False, True], ids=["finished", "undone"])
@pytest.mark.parametrize("name", CASES)
def test_killed_at_every_call(tmp_path: Path, name: str, undo: bool) -> None:
    need_strace()
    case = CASES[name](tmp_path)
    kills: dict[str, int] = {}
    ended: set[str] = set()
    for call, number in every_call():
        path = tmp_path / "disk"
        if call in ended:
            continue
        if not kill_at(case, path, call, number):
            ended.add(call)
        where = judge(case, path, undo=undo)
        if call not in ended:
            kills[where] = kills.get(where, 0) + 1
    print(f"figures: killed {sum(kills.values())} times: {kills}")
    assert {"tail", "switch", "finish"} <= set(kills)
