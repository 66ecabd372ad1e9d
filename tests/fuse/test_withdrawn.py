"""Requests that the kernel withdraws: their process was killed before the daemon had read them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from qedfuse.daemon.control import Client
from qedfuse.host.mountinfo import find_mount
from tests.helpers.mounts.mounts import mounted, need_fuse
from tests.helpers.qemu.cli import qedfuse


def test_the_event_loop_does_not_wait_for_a_request_that_was_withdrawn(tmp_path: Path) -> None:
    """It is told that there is a request, and finds none: then it must not wait for the next one, which may never come.
    While nothing else uses the mount, the control socket shows whether it does."""
    need_fuse()
    assert qedfuse("create", tmp_path / "disk.qed", "1M").code == 0
    raw = tmp_path / "raw"
    raw.touch()
    with mounted(tmp_path / "disk.qed", raw):
        here = find_mount(os.path.realpath(raw))
        assert here is not None
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            child = _touch_for_ever(raw)
            time.sleep(0.003)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with Client(here) as client:
                assert client.ask("status", 20)["pid"]


def _touch_for_ever(raw: Path) -> int:
    """A process that asks the mount, and has nothing open there: the kernel has nothing to say when it ends."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                os.utime(raw)
        finally:
            os._exit(1)
    return child
