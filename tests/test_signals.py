"""Tests have the signals that they need, however they are started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import ROOT

_PROBE = """
import signal, subprocess, sys

def test_probe():
    words = "import signal; print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP).name)"
    print(subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.raise_signal(signal.SIGHUP)  # the run itself goes on
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "in a worker"])
def test_ignored_signals_are_not_handed_on(tmp_path: Path, workers: tuple[str, ...]) -> None:
    probe = tmp_path / "test_probe.py"
    probe.write_text(_PROBE)
    command = [sys.executable, "-m", "pytest", "-q", "-rP", "-p", "no:cacheprovider", "-p", "tests.conftest"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-o", "addopts=", *workers, str(probe)]

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        preexec_fn=ignore,
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "default_int_handler" in done.stdout
    assert "SIG_DFL" in done.stdout
