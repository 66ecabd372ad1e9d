"""How much memory this process may use, by its memory cgroups.

Source: cgroups(7), Linux Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst; proc_pid_cgroup(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

_CGROUP = "/proc/self/cgroup"
_MOUNTINFO = "/proc/self/mountinfo"


def memory_limit() -> int | None:
    """Bytes: the smallest limit of the cgroups that this process is in. None: there is none below the machine's memory,
    or none to be seen (the hierarchy is not mounted here)."""
    limits = []
    with suppress(OSError, ValueError):
        with open(_CGROUP, "rb") as file:
            groups = os.fsdecode(file.read()).split("\n")[:-1]
        with open(_MOUNTINFO, "rb") as file:
            mounts = os.fsdecode(file.read()).split("\n")[:-1]
        limits = [*_limits_v1(groups, mounts), *_limits_v2(groups, mounts)]
    limit = min(limits, default=None)
    return limit if limit is not None and limit < _machine_memory() else None


def _machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limits_v1(groups: Iterable[str], mounts: Iterable[str]) -> Iterator[int]:
    for line in groups:
        _id, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            for directory, _top in _directories(path, mounts, "cgroup", "memory"):
                yield from _numbers(directory, "memory.stat", "hierarchical_memory_limit")  # with its ancestors'


def _limits_v2(groups: Iterable[str], mounts: Iterable[str]) -> Iterator[int]:
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


def _directories(path: str, mounts: Iterable[str], fstype: str, controller: str | None) -> Iterator[tuple[str, str]]:
    """The directory of the cgroup `path` in each mount of its hierarchy that shows it, and the mountpoint."""
    for line in mounts:
        left, _, right = line.partition(" - ")
        root, mountpoint = left.split(" ")[3:5]
        found, _source, options = [*right.split(" "), "", ""][:3]
        if found != fstype or (controller is not None and controller not in options.split(",")):
            continue
        if path == root or path.startswith(root.rstrip("/") + "/"):
            yield os.path.join(mountpoint, path[len(root) :].strip("/")).rstrip("/"), mountpoint


def _numbers(directory: str, file: str, key: str | None) -> Iterator[int]:
    """The number after `key` in a file of a cgroup, or the number that the file is."""
    with suppress(OSError), open(os.path.join(directory, file), encoding="ascii") as lines:
        for line in lines:
            name, _, value = line.strip().rpartition(" ")
            if name == (key or "") and value.isdecimal():
                yield int(value)
