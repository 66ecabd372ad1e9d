"""How many system calls a process makes."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def system_calls(pid: int, name: str, directory: Path) -> Iterator[Callable[[], int]]:
    """Counts a process's system calls of a name."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = directory / "strace.log"
    command = ["strace", "-f", "-q", "-e", f"trace={name}", "-o", str(log), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 20
            while f"TracerPid:\t{process.pid}" not in Path(f"/proc/{pid}/status").read_text():
                if process.poll() is not None:
                    pytest.skip("strace may not attach here")
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield lambda: len(re.findall(rf"^\d+ +{name}\(", log.read_text(), re.MULTILINE))
        finally:
            process.terminate()
