"""A short run of each fuzzer, so that they do not rot; `tests/fuzz/running.py` tells how to make long ones."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.qemu.cli import ROOT, environment

SECONDS = 8


FINDINGS = sorted((ROOT / "tests/fuzz/findings").iterdir())
assert FINDINGS


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda path: path.name)
def test_a_finding(finding: Path) -> None:
    """What `fuzz_open` once stopped at."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (it has wheels for x86-64 only)")
    command = [sys.executable, "-m", "tests.fuzz.fuzz_open", str(finding)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-8000:]


@pytest.mark.parametrize(("target", "edges"), [("fuzz_open", 500), ("fuzz_qcow2", 400)])
def test_a_short_run(tmp_path: Path, target: str, edges: int) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (it has wheels for x86-64 only)")
    command = [sys.executable, "-m", f"tests.fuzz.{target}", f"-max_total_time={SECONDS}", "-seed=1"]
    command += [f"-artifact_prefix={tmp_path}/"]
    # The shell forks: a process counts what the one that it replaced held as its own memory, and pytest holds much.
    command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-8000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    assert runs and covered, done.stderr[-2000:]
    print(f"figures: fuzzed {runs[1]} inputs, {covered[-1]} edges covered")
    assert int(runs[1]) > 50
    assert int(covered[-1]) > edges, "the instrumentation sees nothing"
