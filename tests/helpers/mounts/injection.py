"""Faults in the system calls of a daemon that runs, by strace."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def injected(pid: int, fault: str, *, path: str = "", seconds: float = 20) -> Iterator[None]:
    """`fault` as strace(1) has it, such as "fdatasync:error=EIO", during the block; with `path`, in calls on this file
    alone. At its end strace may need so many seconds to let the process go."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    call = fault.partition(":")[0]
    command = ["strace", "-f", "-p", str(pid), "-e", f"trace={call}", "-e", f"inject={fault}"]
    command += ["-P", path] if path else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            while "attached" not in (line := process.stderr.readline()):
                assert "Requested path" in line, line
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=seconds)
