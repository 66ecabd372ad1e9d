"""Every crash of the real daemon: strace writes down what it does to its image, fast path and all, while a guest uses
the mount, and each state that a loss of power could then leave is built, opened and judged as in test_crash.py.

`QEDFUSE_CRASH_STATES` and `QEDFUSE_CRASH_SEED` are as there; the seed chooses the states and the guest's random walks,
while what the kernel and the threads do is another thing each time. After a failure the log is in the test's directory.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.helpers.doubles.crash import SEED, STATES
from tests.helpers.doubles.schedule import run_seeded
from tests.helpers.judges.strace_log import read_log
from tests.helpers.judges.survival import Run
from tests.helpers.judges.traced_run import run_of
from tests.helpers.mounts.aio import SUPPORTED
from tests.helpers.mounts.modes import NATIVE, NEEDS_NATIVE, PYTHON, Mode
from tests.helpers.mounts.mounted_guest import CLUSTER, SCENARIOS
from tests.helpers.mounts.mounts import QEMU_IMG
from tests.helpers.mounts.traced import BELOW, Traced, traced

SAMPLES = STATES // 100  # of each run
#: Writes that the fast path must have answered at least: more than could be in place, hence into new clusters.
NATIVE_WRITES = {"allocate": 12, "sequential": 3, "tables": 4}

in_native_mode = pytest.mark.parametrize("mode", [pytest.param(NATIVE, id="native", marks=NEEDS_NATIVE)])


class Totals:
    runs = states = complete = sampled = qemu = native = 0

    def add(self, traced: Traced, run: Run) -> None:
        self.runs += 1
        self.states += run.tried
        self.complete += run.complete_points
        self.sampled += run.sampled_points
        self.qemu += run.qemu_states
        self.native += traced.native


TOTALS = Totals()


def judge(run: Run, directory: Path | None, seed: int = SEED) -> None:
    async def main() -> None:
        ask_qemu = directory if QEMU_IMG else None
        await run.enumerate(random.Random(seed), complete=100, samples=SAMPLES, directory=ask_qemu, ask_qemu=2)

    run_seeded(SEED, main)


def crash(
    directory: Path, scenario: str, mode: Mode, backing: str, seed: int = SEED, *, cached: bool | None = None
) -> Traced:
    if scenario == "asynchronous" and not SUPPORTED:
        pytest.skip("not known how to write asynchronously on this processor")
    found = traced(directory, scenario, mode, backing, seed, cached=cached)
    run = run_of(found)
    judge(run, directory, seed)
    TOTALS.add(found, run)
    assert run.tried > 20
    return found


@in_native_mode
@pytest.mark.parametrize("backing", BELOW)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_native(tmp_path: Path, mode: Mode, scenario: str, backing: str) -> None:
    found = crash(tmp_path, scenario, mode, backing)
    assert found.native >= NATIVE_WRITES.get(scenario, 1), "the fast path left the work to Python"
    if scenario == "holes":
        assert reused(found), "no hole was written into"


@in_native_mode
@pytest.mark.parametrize("backing", BELOW)
@pytest.mark.parametrize("scenario", ["threads", "asynchronous"])
def test_writers_past_the_cache(tmp_path: Path, mode: Mode, scenario: str, backing: str) -> None:
    """The kernel lets them write in parallel."""
    assert crash(tmp_path, scenario, mode, backing, cached=False).native > 0


@pytest.mark.parametrize(
    ("scenario", "backing"),
    [("allocate", "alone"), ("holes", "over raw"), ("threads", "alone"), ("resize", "over raw"), ("walk", "over raw")],
)
def test_python(tmp_path: Path, scenario: str, backing: str) -> None:
    assert crash(tmp_path, scenario, PYTHON, backing).native == 0


@in_native_mode
@pytest.mark.parametrize("seed", [SEED + number for number in range(1, max(2, STATES // 25_000))])
def test_random_walks(tmp_path: Path, mode: Mode, seed: int) -> None:
    """More of them for more states; every other one in the writeback cache."""
    crash(tmp_path, "walk", mode, list(BELOW)[seed // 2 % 2], seed)


def reused(found: Traced) -> bool:
    """Whether something was written to where there was a hole before."""
    holes: set[int] = set()
    for event in found.events:
        call = event.call
        if call.path == found.image and call.kind == "punch":
            holes.update(range(call.offset // CLUSTER, (call.offset + call.size) // CLUSTER))
        elif call.path == found.image and call.kind == "write" and call.offset // CLUSTER in holes:
            return True
    return False


def test_the_log_keeps_calls_that_overlap_apart(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = [
        rb'11 pwritev(5<\x2f\x61>, [{iov_base=""}, {iov_base="\x22\x5c", iov_len=2}], 2, 4096 <unfinished ...>',
        rb"12 fdatasync(5<\x2f\x61> <unfinished ...>",
        rb"11 <... pwritev resumed>) = 2",
        rb'13 pwrite64(7<\x2f\x62>, "\x5d", 1, 513) = 1',
        rb"12 <... fdatasync resumed>) = 0",
        rb"13 fallocate(7<\x2f\x62>, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 1, 20) = 0",
        rb"13 +++ exited with 0 +++",
    ]
    log.write_bytes(b"\n".join(lines))
    events = read_log(log)
    assert [(event.call.path, event.call.kind, event.ended) for event in events] == [
        ("/a", "write", False),
        ("/a", "synced", False),
        ("/a", "write", True),
        ("/b", "write", False),
        ("/b", "write", True),
        ("/a", "synced", True),
        ("/b", "punch", False),
        ("/b", "punch", True),
    ]
    calls = [event.call for event in events if event.ended]
    assert [(call.offset, call.data, call.size) for call in calls] == [
        (4096, b'"\\', 0),
        (513, b"]", 0),
        (0, b"", 0),
        (1, b"", 20),
    ]


@pytest.mark.parametrize(
    "line",
    [
        rb'1 pwrite64(5<\x2f\x61>, "\x22\x22", 2, 0) = 1',
        rb'1 pwrite64(5<\x2f\x61>, "\x22"..., 2, 0) = 2',
        rb'1 write(5<\x2f\x61>, "\x22", 1) = 1',
        rb"1 fdatasync(5<\x2f\x61>) = -1 EIO (Input/output error)",
        rb"1 fdatasync(5<\x2f\x61> <unfinished ...>",
        rb"1 fallocate(5<\x2f\x61>, FALLOC_FL_COLLAPSE_RANGE, 0, 4096) = 0",
    ],
)
def test_the_log_must_be_understood(tmp_path: Path, line: bytes) -> None:
    log = tmp_path / "log"
    log.write_bytes(line)
    with pytest.raises(AssertionError):
        read_log(log)


def test_how_many_states() -> None:
    """Says it; and when all of the above ran, it were many."""
    print(
        f"figures: {TOTALS.states} different states (seed {SEED}) of crashes of {TOTALS.runs} real mounts, "
        f"{TOTALS.complete} moments in full, {TOTALS.sampled} sampled; {TOTALS.qemu} states judged by qemu-img as "
        f"well; {TOTALS.native} writes answered by the fast path"
    )
    if TOTALS.runs >= 2 * len(SCENARIOS):
        assert TOTALS.states >= SAMPLES * TOTALS.runs // 5
