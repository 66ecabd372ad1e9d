"""Commands that look at a mount and may hang: they are begun here, and waited for no longer than a moment takes."""

from __future__ import annotations

import subprocess
from pathlib import Path

#: Seconds for what takes a moment, or as long as a host is given time.
SOON = 20


def run(*command: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes], seconds: float = SOON) -> tuple[int, bytes, str]:
    """The exit code, the output, and the last words of a command."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err.decode().strip().rpartition(": ")[2]


def first_byte(path: Path) -> bytes:
    code, out, err = finish(run("head", "-c", "1", path))
    assert code == 0, err
    return out
