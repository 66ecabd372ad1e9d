"""Memory cgroups of a test's own, version 1 or 2, whichever this machine has.

with memory_group(1, 60 << 20) as group:
    qedfuse("mount", ..., wrapper=group.words)    # in the group
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from qedfuse.daemon.memory_limit import memory_limit

_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}


class MemoryGroup(NamedTuple):
    path: Path

    @property
    def words(self) -> tuple[str, ...]:
        """A command line that goes in front of one that is to run in the group."""
        return ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"))

    def processes(self) -> list[int]:
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]


@contextmanager
def memory_group(version: int, limit: int) -> Iterator[MemoryGroup]:
    """A new group that may use `limit` bytes. What is left in it in the end is killed. Skips where there is none."""
    path = _hierarchy(version) / f"qedfuse-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        path.mkdir()
        try:
            (path / _LIMIT[version]).write_text(str(limit))
        except OSError:
            path.rmdir()
            raise
    except OSError as error:
        pytest.skip(f"no memory cgroup (version {version}) can be made: {error}")
    group = MemoryGroup(path)
    try:
        yield group
    finally:
        deadline = time.monotonic() + 20
        while path.exists() and time.monotonic() < deadline:
            for pid in group.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
            with suppress(OSError):
                path.rmdir()
            time.sleep(0.05)
        assert not path.exists(), f"{path}: cannot be removed"


def _hierarchy(version: int) -> Path:
    """Where the hierarchy of the memory controller is mounted."""
    if memory_limit() is not None:
        pytest.skip("the memory of this process is limited already")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        mountpoint = Path(left.split(" ")[4])
        fstype, _source, options = right.split(" ")[:3]
        if version == 1 and fstype == "cgroup" and "memory" in options.split(","):
            return mountpoint
        if version == 2 and fstype == "cgroup2":
            enabled = mountpoint / "cgroup.subtree_control"
            if enabled.exists() and "memory" in enabled.read_text().split():
                return mountpoint
    pytest.skip(f"there is no memory controller in a cgroup hierarchy of version {version} here")
