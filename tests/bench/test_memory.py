"""Tests of what is done for the machine's memory before a measurement."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
from pathlib import Path
from tests.bench.memory import have_at_hand

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10

before = peak()
have_at_hand(64 << 20)
print(peak() - before)
"""


def test_every_page_is_touched() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], check=True, capture_output=True, text=True)
    assert 60 <= int(done.stdout) <= 80
