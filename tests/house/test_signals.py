"""Tests have the signals that they need, however they are started, and leave nothing behind, however they end."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.mounts.mounts import Mounted, mounted, wait_for_exit, wait_until
from tests.helpers.qemu.cli import ROOT, environment, qemu_img

_PROBE = """
import signal, subprocess, sys

def test_probe():
    words = "import signal; print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP).name)"
    print(subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.raise_signal(signal.SIGHUP)  # the run itself goes on
"""

_SLOW = """
import pathlib, time

def test_slow():
    place = pathlib.Path(__file__).parent
    try:
        (place / "begun").touch()
        time.sleep(200)
    finally:
        (place / "cleaned-up").touch()
"""


def probe(directory: Path, program: str, *words: str) -> list[str]:
    """The command that runs a test of its own in `directory`."""
    path = directory / "test_probe.py"
    path.write_text(program)
    command = [sys.executable, "-m", "pytest", "-q", "-rP", "-p", "no:cacheprovider", "-p", "tests.conftest"]
    return [*command, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-o", "addopts=", *words, str(path)]


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "in a worker"])
def test_ignored_signals_are_not_handed_on(tmp_path: Path, workers: tuple[str, ...]) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    done = subprocess.run(
        probe(tmp_path, _PROBE, *workers),
        preexec_fn=ignore,
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "default_int_handler" in done.stdout
    assert "SIG_DFL" in done.stdout


def test_a_run_that_is_told_to_end_cleans_up(tmp_path: Path) -> None:
    with subprocess.Popen(probe(tmp_path, _SLOW), env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL) as run:
        try:
            wait_until((tmp_path / "begun").exists)
            run.terminate()
            assert run.wait(100) != 0
        finally:
            run.kill()
    assert (tmp_path / "cleaned-up").exists()


@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
def test_a_failure_leaves_no_daemon(tmp_path: Path, raw: Path, foreground: bool) -> None:
    """Not even one that would wait for ever until it can write what it has."""
    image = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", image, "1M")
    pids: list[int] = []

    def fail(mount: Mounted) -> None:
        pids.append(mount.pid())
        with raw.open("r+b") as file:
            file.write(b"x" * 4096)
        resource.prlimit(pids[0], resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), mounted(image, raw, foreground=foreground) as mount:
        fail(mount)
    wait_for_exit(pids[0])
