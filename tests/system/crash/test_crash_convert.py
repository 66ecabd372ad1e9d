"""Every crash of a real `qedfuse convert` to QED: strace writes down what it does to its target, and what a loss of
power could then leave is no image, or the whole new one; where there was an image before, it may also be that.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qedfuse.host.output_file import OutputFile
from tests.helpers.doubles.crash import SEED, Change, CrashPoint, CrashStorage
from tests.helpers.doubles.ram import RamFile
from tests.helpers.images.conversions import MIB, flat, qemu_finds_no_error
from tests.helpers.judges.history import Clock
from tests.helpers.judges.strace_log import OPTIONS, Event, read_log
from tests.helpers.qemu.cli import TIMEOUT, environment, qemu_img

SIZE = 6 * MIB
GEOMETRY = "cluster_size=4k,table_size=2"
#: Of each moment.
SAMPLES = 12
_WITHOUT = (
    "import sys; from qedfuse.host.output_file import OutputFile; OutputFile.{} = {}; "
    "from qedfuse.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def disk(path: Path, seed: int) -> Path:
    """Runs of data, in more than one table."""
    rnd = random.Random(seed)
    with path.open("wb") as file:
        for start in range(0, SIZE, SIZE // 12):
            file.seek(start)
            file.write(rnd.randbytes(8 * 1024))
        file.truncate(SIZE)
    return path


def converted(one: Path, target: Path, program: list[str]) -> CrashStorage:
    """Convert. Returns what was done to the target."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    file = RamFile.of(target.read_bytes() if target.exists() else b"")
    log = target.with_suffix(".log")
    strace = ["strace", *OPTIONS, "-o", str(log), "-P", str(target)]
    words = ["convert", "--reflink=never", "-f", "raw", "-O", "qed", "-o", GEOMETRY]
    line = [*strace, sys.executable, *program, *words, str(one), str(target)]
    subprocess.run(line, env=environment(), check=True, timeout=TIMEOUT)
    storage = CrashStorage("target", file, Clock())
    replay(storage, read_log(log))
    assert storage.file.read(0, storage.file.size) == target.read_bytes()
    return storage


def replay(storage: CrashStorage, events: list[Event]) -> None:
    """Calls of which each has ended before the next one begins."""
    for begun, ended in zip(events[::2], events[1::2], strict=True):
        call = ended.call
        assert begun.call is call and ended.ended
        if call.kind == "write":
            storage.apply_write(call.offset, call.data)
        elif call.kind == "truncate":
            storage.apply_truncate(call.size)
        else:
            assert call.kind == "synced"
            storage.log.append(Change(storage.clock.tick(), "synced", begun=len(storage.log)))


def some_states(point: CrashPoint, rnd: random.Random) -> list[bytes]:
    states = [point.least(), point.most(), *(point.some_state(rnd) for _ in range(SAMPLES))]
    return [state.read(0, state.size) for state in states]


def judge(storage: CrashStorage, one: Path, old: Path | None, directory: Path) -> int:
    """Returns how many different states there were."""
    wholes = [path.read_bytes() for path in (one, old) if path]
    rnd, tried = random.Random(SEED), set()
    found = directory / "found.qed"
    for point in storage.crash_points():
        for state in some_states(point, rnd):
            if state in tried:
                continue
            tried.add(state)
            if state.startswith(b"QED\0"):
                found.write_bytes(state)
                qemu_finds_no_error(found)
                assert flat(found).read_bytes() in wholes
    assert storage.crash_point_now().pending == []
    assert flat_of(storage, found) == wholes[0]
    return len(tried)


def flat_of(storage: CrashStorage, path: Path) -> bytes:
    path.write_bytes(storage.file.read(0, storage.file.size))
    return flat(path).read_bytes()


def enumerate_crashes(directory: Path, *, existed: bool, program: list[str]) -> int:
    directory = directory.resolve()  # as strace shows it
    one, target = disk(directory / "one.raw", 1), directory / "target.qed"
    old = disk(directory / "old.raw", 2) if existed else None
    if old:
        qemu_img("convert", "-f", "raw", "-O", "qed", "-o", GEOMETRY, old, target)
    return judge(converted(one, target, program), one, old, directory)


@pytest.mark.parametrize("existed", [False, True], ids=["new", "over an image"])
def test_a_crash_in_a_conversion(tmp_path: Path, existed: bool) -> None:
    states = enumerate_crashes(tmp_path, existed=existed, program=["-m", "qedfuse"])
    assert states > 30
    print(f"figures: {states} states")


@pytest.mark.parametrize(
    ("method", "instead", "existed"),
    [("empty", "lambda self: self.truncate(0)", True), ("write", "OutputFile.__mro__[1].write", False)],
    ids=["the old header goes when it likes", "the new one comes when it likes"],
)
def test_the_crash_test_bites(tmp_path: Path, method: str, instead: str, existed: bool) -> None:
    assert hasattr(OutputFile, method)
    with pytest.raises(AssertionError):
        enumerate_crashes(tmp_path, existed=existed, program=["-c", _WITHOUT.format(method, instead)])
