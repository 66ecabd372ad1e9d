"""Running a command's coroutine without an event loop."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.qemu.cli import ROOT, environment


def test_an_interrupt_prints_nothing() -> None:
    """Not even of a coroutine that was about to be awaited."""
    program = """
import signal
from qedfuse.host.waiting import checkpoint, run_blocking

async def job():
    step = checkpoint()
    signal.raise_signal(signal.SIGINT)
    await step

try:
    run_blocking(job())
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment({"PYTHONWARNINGS": "default"}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
