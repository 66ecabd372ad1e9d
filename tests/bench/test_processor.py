"""The processor time of a process and its children."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.bench.processor import parse_stat, used_by, with_children

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("name", ["qemu", "IO a", "a) S 1 (b", ""])
def test_a_stat_whatever_the_name(name: str) -> None:
    fields = "S 42 43 43 0 -1 4194304 2980 6586 0 2 150 250 3000 4000 20 0 1 0 245256"
    assert parse_stat(f"99 ({name}) {fields}\n") == (99, 42, 400 / TICKS)


def test_those_below_count_and_no_others() -> None:
    stats = [(1, 0, 100.0), (10, 1, 1.0), (11, 10, 2.0), (12, 11, 4.0), (13, 10, 8.0), (20, 1, 16.0)]
    assert with_children(stats, 10) == 15
    assert with_children(stats, 12) == 4
    assert with_children(stats, 99) == 0


def test_a_process_is_seen_to_work_and_so_is_its_child() -> None:
    busy = "import time\nwhile time.process_time() < {}: pass\n"
    parent = (
        f"import subprocess, sys\n{busy.format(0.1)}"
        f"subprocess.Popen([sys.executable, '-c', {busy.format(0.3) + 'time.sleep(60)'!r}]).wait()"
    )
    with subprocess.Popen([sys.executable, "-c", parent], start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 30
            while used_by(process.pid) < 0.35:  # each of them has up to two ticks that do not show
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, 9)
    assert used_by(process.pid) == 0
