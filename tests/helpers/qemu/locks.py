"""QEMU's locks on images: the bytes that a process has locked, and processes of QEMU's that hold them."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TO_READ = {100, 201, 203}
TO_WRITE = {100, 101, 103, 201, 203}


@contextmanager
def qemu_holding(tool: str, path: str, *, writable: bool, format: str = "qed") -> Iterator[int]:
    """A QEMU process that has the image open; its pid. Both tools go to the background when the image is open."""
    socket, pid_file = f"{path}.{tool}.socket", f"{path}.{tool}.pid"
    if tool == "qemu-nbd":
        command = [tool, "--fork", "--persistent", "--pid-file", pid_file, "-k", socket, "-f", format, path]
        command += [] if writable else ["-r"]
    else:
        mode = "off" if writable else "on"
        command = [tool, "--daemonize", "--pidfile", pid_file]
        command += ["--blockdev", f"file,node-name=file,read-only={mode},filename={path}"]
        command += ["--blockdev", f"{format},node-name=disk,read-only={mode},file=file"]
        command += ["--nbd-server", f"addr.type=unix,addr.path={socket}"]
        command += ["--export", f"nbd,id=export,node-name=disk,writable={'on' if writable else 'off'}"]
    subprocess.run(command, check=True, timeout=30, stdin=subprocess.DEVNULL)
    pid = int(Path(pid_file).read_text())
    end = os.pidfd_open(pid)
    try:
        yield pid
    finally:
        signal.pidfd_send_signal(end, signal.SIGTERM)
        gone, _, _ = select.select([end], [], [], 30)
        os.close(end)
        assert gone, f"{tool} does not end"


def lock_bytes(pid: int | str, path: str, fd: int | None = None) -> set[int]:
    """The bytes that a process has locked in a file, as the kernel lists them."""
    found: set[int] = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        if (fd is None or int(name) == fd) and os.path.realpath(f"/proc/{pid}/fd/{name}") == os.path.realpath(path):
            for line in Path(f"/proc/{pid}/fdinfo/{name}").read_text().splitlines():
                if match := re.search(r"OFDLCK.* READ .* (\d+) (\d+)$", line):
                    found.update(range(int(match[1]), int(match[2]) + 1))
    return found
