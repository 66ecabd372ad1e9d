"""`rebase` and `commit` get a signal at their system calls on the files that they write, each in turn, and run again.

A kill is no loss of power, whose states are enumerated in tests/system/crash: here it is the real process, its real
calls, and what QEMU makes of the files afterwards.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from qedfuse.errors import EXIT_INTERRUPTED
from tests.helpers.images.conversions import MIB, flat, make_chain
from tests.helpers.mounts.guests import qemu_check
from tests.helpers.qemu.cli import TIMEOUT, environment, qedfuse

#: Makes files in a directory: what to run, and what it writes, the image first.
Make = Callable[[Path], tuple[tuple[str, ...], list[Path]]]

_CALLS = "pwrite64,pwritev,ftruncate,fallocate,fdatasync"
KIB = 1 << 10


def strace(files: list[Path], words: list[str], command: tuple[str, ...]) -> int:
    """Run the command, with strace looking at what it does to the files. Returns the exit code, or minus the signal."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    paths = [word for file in files for word in ("-P", str(file))]
    line = ["strace", "-f", "-qq", *paths, *words, sys.executable, "-m", "qedfuse", *command]
    done = subprocess.run(line, env=environment(), capture_output=True, timeout=TIMEOUT, check=False)
    return done.returncode


def calls_of(files: list[Path], command: tuple[str, ...], log: Path) -> Counter[str]:
    """How often each call is made: the most by one thread, since strace counts for each of its own."""
    assert strace(files, ["-e", f"trace={_CALLS}", "-o", str(log)], command) == 0
    by_thread = Counter(re.findall(rf"^(\d+) +({_CALLS.replace(',', '|')})\(", log.read_text(), re.MULTILINE))
    most: Counter[str] = Counter()
    for (_thread, call), count in by_thread.items():
        most[call] = max(most[call], count)
    return most


def end_everywhere(make: Make, directory: Path, name: str, step: int) -> None:
    """With a `step` of more than one, only at some of the calls."""
    command, files = make(directory / "first")
    before = judge(files[0])
    moments = [
        (call, number)
        for call, count in sorted(calls_of(files, command, directory / "log").items())
        for number in range(1, count + 1)
    ]
    assert judge(files[0]) == before
    assert len(moments) > 5
    chosen = moments[step // 2 :: step]
    ended = 0
    for call, number in chosen:
        place = directory / f"{call}-{number}"
        command, files = make(place)
        words = ["-e", f"trace={call}", "-e", f"inject={call}:signal={name}:when={number}", "-o", "/dev/null"]
        code = strace(files, words, command)
        assert code in (0, -signal.SIGKILL if name == "KILL" else EXIT_INTERRUPTED)
        ended += code != 0
        assert judge(files[0]) == before, f"{name} at {call} number {number}"
        again = qedfuse(*command)
        assert again.code == 0, again
        assert judge(files[0]) == before, f"{name} at {call} number {number}, and run again"
        shutil.rmtree(place)
    print(f"figures: {ended} times ended by SIG{name}, of {len(moments)} calls")
    assert ended or name == "INT"


def judge(image: Path) -> bytes:
    """What QEMU reads through it; nothing in the chain may be corrupt."""
    for path in image.parent.glob("*.qed"):
        assert qemu_check(path).get("corruptions", 0) == 0
    return flat(image).read_bytes()


def committed(*layers: tuple[str, int]) -> Make:
    def make(directory: Path) -> tuple[tuple[str, ...], list[Path]]:
        directory.mkdir()
        image = make_chain(directory, *layers, options="cluster_size=4k,table_size=2")
        base = directory / f"{len(layers) - 2}.{layers[-2][0]}"
        return ("commit", str(image)), [image, base]

    return make


def rebased(old: tuple[str, int], new: tuple[str, int] | None) -> Make:
    def make(directory: Path) -> tuple[tuple[str, ...], list[Path]]:
        directory.mkdir()
        options = "cluster_size=4k,table_size=2"
        image = make_chain(directory, old, ("qed", MIB), options=options)
        if new is None:
            return ("rebase", "-b", "", str(image)), [image]
        (directory / "new").mkdir()
        below = make_chain(directory / "new", new, seed=7, options=options)
        return ("rebase", "-b", str(below), "-F", new[0], str(image)), [image]

    return make


CASES = {
    "commit to raw": committed(("raw", 500 * KIB), ("qed", MIB)),
    "commit to qed": committed(("qed", 500 * KIB), ("qed", MIB)),
    "commit to qed over raw": committed(("raw", MIB), ("qed", 500 * KIB), ("qed", MIB)),
    "rebase to raw": rebased(("raw", 700 * KIB), ("raw", 400 * KIB)),
    "rebase to qed": rebased(("qed", 500 * KIB), ("qed", 2 * MIB)),
    "rebase to none": rebased(("raw", 700 * KIB), None),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_at_some_calls(case: str, tmp_path: Path) -> None:
    end_everywhere(CASES[case], tmp_path, "KILL", step=8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["KILL", "INT"])
@pytest.mark.parametrize("case", CASES)
def test_ended_at_every_call(case: str, name: str, tmp_path: Path) -> None:
    end_everywhere(CASES[case], tmp_path, name, step=1)
