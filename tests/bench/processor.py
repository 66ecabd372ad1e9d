"""The processor time that a server has used, its children included (nbdfuse's requests end in its qemu-nbd)."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")


def parse_stat(text: str) -> tuple[int, int, float]:
    """A process, its parent, and the seconds it has used, in user mode and in the kernel, from its /proc/PID/stat."""
    pid = int(text.split(maxsplit=1)[0])
    fields = text.rpartition(")")[2].split()  # a name may contain spaces and brackets
    return pid, int(fields[1]), (int(fields[11]) + int(fields[12])) * _TICK


def with_children(stats: list[tuple[int, int, float]], root: int) -> float:
    """What a process and all below it have used."""
    children = defaultdict(list)
    used = {}
    for pid, parent, seconds in stats:
        children[parent].append(pid)
        used[pid] = seconds
    total, waiting = 0.0, [root]
    while waiting:
        pid = waiting.pop()
        total += used.get(pid, 0.0)
        waiting += children[pid]
    return total


def used_by(root: int) -> float:
    """Seconds that a process that runs, and its children that run, have used up to now."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats.append(parse_stat(path.read_text()))
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    return with_children(stats, root)
