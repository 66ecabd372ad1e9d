"""How much memory this process may use, by its memory cgroups.

Source: cgroups(7), Linux Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst; proc_pid_cgroup(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

from qedfuse.host.mountinfo import Mount, read_mounts

_CGROUP = "/proc/self/cgroup"


def memory_limit() -> int | None:
    """Bytes: the smallest limit of the cgroups that this process is in. None: there is none below the machine's memory,
    or none to be seen (the hierarchy is not mounted here)."""
    limits = []
    with suppress(OSError, ValueError):
        with open(_CGROUP, "rb") as file:
            groups = os.fsdecode(file.read()).split("\n")[:-1]
        mounts = read_mounts()
        limits = [*_limits_v1(groups, mounts), *_limits_v2(groups, mounts)]
    limit = min(limits, default=None)
    return limit if limit is not None and limit < _machine_memory() else None


def _machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limits_v1(groups: Iterable[str], mounts: Iterable[Mount]) -> Iterator[int]:
    for line in groups:
        _id, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            for directory, _top in _directories(path, mounts, "cgroup", "memory"):
                yield from _numbers(directory, "memory.stat", "hierarchical_memory_limit")  # with its ancestors'


def _limits_v2(groups: Iterable[str], mounts: Iterable[Mount]) -> Iterator[int]:
    for line in groups:
        id, _controllers, path = line.split(":", 2)
        if id == "0":
            for directory, top in _directories(path, mounts, "cgroup2", None):
                while True:
                    for name in ("memory.max", "memory.high"):
                        yield from _numbers(directory, name, None)
                    if directory == top:
                        break
                    directory = os.path.dirname(directory)


def _directories(path: str, mounts: Iterable[Mount], fstype: str, controller: str | None) -> Iterator[tuple[str, str]]:
    """The directory of the cgroup `path` in each mount of its hierarchy that shows it, and the mountpoint."""
    for mount in mounts:
        if mount.fstype != fstype or (controller is not None and controller not in mount.options.split(",")):
            continue
        if path == mount.root or path.startswith(mount.root.rstrip("/") + "/"):
            below = path[len(mount.root) :].strip("/")
            yield os.path.join(mount.mountpoint, below).rstrip("/"), mount.mountpoint


def _numbers(directory: str, file: str, key: str | None) -> Iterator[int]:
    """The number after `key` in a file of a cgroup, or the number that the file is."""
    with suppress(OSError), open(os.path.join(directory, file), encoding="ascii") as lines:
        for line in lines:
            name, _, value = line.strip().rpartition(" ")
            if name == (key or "") and value.isdecimal():
                yield int(value)
