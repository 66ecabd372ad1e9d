"""compact and resize, ended by a signal at one of the system calls by which they change the image: it reads the same.

strace counts the calls of a whole run, and ends others on the way into some of them; the slow tests take many.
What a loss of power leaves is enumerated in tests/check/test_leaks_crash.py and tests/system/crash.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from qedfuse.qed.header import HEADER_BYTES
from tests.helpers.images.check_faults import broken, cut_short_and_leaks
from tests.helpers.images.check_images import header_of
from tests.helpers.images.conversions import MIB, flat
from tests.helpers.images.leaky import drop
from tests.helpers.judges.check_tools import qemu_check
from tests.helpers.judges.strace_log import CALLS
from tests.helpers.qemu.cli import TIMEOUT, environment, new_image, qedfuse, qemu_img, qemu_io

#: How many moments of a run are tried.
SAMPLES = 2
MANY = 40

SMALL_BATCHES = (
    "import sys; from qedfuse.check import gap_filling; gap_filling.BATCH_CLUSTERS = 40; "
    "from qedfuse.cli.main import main; sys.exit(main(sys.argv[1:]))"
)

ENDINGS = pytest.mark.parametrize("name", ["KILL", "INT"])


def traced(path: Path, fault: str, *words: object) -> tuple[int, str]:
    """Run `qedfuse` with a fault in its calls on `path`. Returns its exit code, negative for a signal, and the log."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = path.with_suffix(".log")
    strace = ["strace", "-f", "-qq", "-o", str(log), "-P", str(path), "-e", f"trace={CALLS}"]
    strace += ["-e", f"inject={fault}"] if fault else []
    line = [*strace, sys.executable, "-c", SMALL_BATCHES, *map(str, words)]
    done = subprocess.run(
        line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=TIMEOUT, check=False
    )
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, log.read_text()


def moments(path: Path, samples: int, name: str, *words: object) -> list[str]:
    """Some of the calls of a whole run on `path`, each as a fault: a signal on the way into it."""
    code, log = traced(path, "", *words)
    assert code == 0
    calls = Counter(re.findall(r"^\d+ +(\w+)\(", log, re.MULTILINE))
    found = [f"{call}:signal={name}:when={when + 1}" for call, number in calls.items() for when in range(number)]
    assert len(found) > 2, log
    return random.Random(name).sample(found, min(samples, len(found)))


def overlay_or_not(path: Path, rng: random.Random, *, backing: bool) -> Path:
    """Of 4 MiB, with writes all over it."""
    words: tuple[str, ...] = ()
    if backing:
        base = path.with_name("base.raw")
        base.write_bytes(rng.randbytes(8 * MIB))
        words = ("-b", base.name, "-F", "raw")
    new_image(path, "4M", "-o", "cluster_size=4k,table_size=2", *words)
    qemu_io(path, *(f"write -P {rng.randrange(1, 255)} {rng.randrange(1000) * 4096} 8k" for _ in range(120)))
    return path


def leaky_alone(path: Path) -> Path:
    rng = random.Random(1)
    assert drop(overlay_or_not(path, rng, backing=False), rng, 0.4) > 40
    return path


def leaky_overlay(path: Path) -> Path:
    rng = random.Random(2)
    assert drop(overlay_or_not(path, rng, backing=True), rng, 0.4) > 40
    return path


def cut_short(path: Path) -> Path:
    path.write_bytes(broken(cut_short_and_leaks))
    return path


def interrupt_compact(directory: Path, make: Callable[[Path], Path], name: str, samples: int) -> None:
    path, whole = directory / "image.qed", directory / "whole.qed"
    original = make(directory / "original.qed")
    copy = flat(original)
    shutil.copy(original, whole)
    ended = 0
    for moment in moments(whole, samples, name, "compact", whole):
        shutil.copy(original, path)
        code, _ = traced(path, moment, "compact", path)
        assert code in ((-signal.SIGKILL,) if name == "KILL" else (0, 130)), (moment, code)
        ended += code != 0
        assert "corruptions" not in qemu_check(path)[1], moment
        qemu_img("compare", "-f", "qed", "-F", "raw", path, copy)
        assert qedfuse("compact", "-q", path) == (0, "", ""), moment
        assert path.stat().st_size == whole.stat().st_size and qemu_check(path)[0] == 0, moment
        qemu_img("compare", "-f", "qed", "-F", "raw", path, copy)
    assert ended


def interrupt_resize(directory: Path, wanted: int, backing: bool, name: str, samples: int) -> None:
    path, whole, new = directory / "image.qed", directory / "whole.qed", directory / "new.flat"
    original = overlay_or_not(directory / "original.qed", random.Random(wanted), backing=backing)
    old = flat(original)
    shutil.copy(old, new)
    with new.open("r+b") as file:
        file.truncate(wanted)
    shutil.copy(original, whole)
    ended = 0
    sizes = set()
    for moment in moments(whole, samples, name, "resize", "--shrink", whole, wanted):
        shutil.copy(original, path)
        code, _ = traced(path, moment, "resize", "--shrink", path, wanted)
        assert code in (0, -signal.SIGKILL if name == "KILL" else 130), (moment, code)  # (it may sync once less)
        ended += code != 0
        assert "corruptions" not in qemu_check(path)[1], moment
        with path.open("rb") as file:
            header = header_of(file.read(HEADER_BYTES))
        sizes.add(header.image_size)
        assert name == "KILL" or not header.needs_check, moment
        expected = {4 * MIB: old, wanted: new}[header.image_size]
        words = "compare", "-q", "-f", "qed", "-F", "raw", path, expected
        qemu_img(*words)
        assert qedfuse(*words) == (0, "", ""), moment
        assert qedfuse("resize", "-q", "--shrink", path, str(wanted)).code == 0, moment
        qemu_img("compare", "-f", "qed", "-F", "raw", path, new)
        assert "corruptions" not in qemu_check(path)[1], moment
    assert ended or name == "INT"
    assert samples < MANY or name == "INT" or len(sizes) == 2


COMPACTED = pytest.mark.parametrize("make", [leaky_alone, leaky_overlay, cut_short])
RESIZED = pytest.mark.parametrize("wanted", [MIB + 3 * 512, 6 * MIB + 512], ids=["shorter", "longer"])
OVER = pytest.mark.parametrize("backing", [False, True], ids=["alone", "overlay"])


@ENDINGS
@COMPACTED
def test_compact(tmp_path: Path, make: Callable[[Path], Path], name: str) -> None:
    interrupt_compact(tmp_path, make, name, SAMPLES)


@ENDINGS
@RESIZED
@OVER
def test_resize(tmp_path: Path, wanted: int, backing: bool, name: str) -> None:
    interrupt_resize(tmp_path, wanted, backing, name, SAMPLES)


@pytest.mark.slow
@ENDINGS
@COMPACTED
def test_compact_at_many_calls(tmp_path: Path, make: Callable[[Path], Path], name: str) -> None:
    interrupt_compact(tmp_path, make, name, MANY)


@pytest.mark.slow
@ENDINGS
@RESIZED
@OVER
def test_resize_at_many_calls(tmp_path: Path, wanted: int, backing: bool, name: str) -> None:
    interrupt_resize(tmp_path, wanted, backing, name, MANY)
