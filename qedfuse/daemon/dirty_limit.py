"""How much unwritten data the kernel may hold for a mount, so that daemon and kernel never wait for each other when
memory is short.

The kernel frees memory by writing back dirty pages. Those of our mount are written back by us; so if a memory cgroup is
full of them, and we need memory in that cgroup to write them, nothing goes on (or the daemon is killed for its memory).
The kernel's own precautions do not hold there: its limit of the dirty pages of a mount knows the machine's memory, not
the cgroup's; version 1 has a process that needs memory wait for any page under write-back; version 2 slows a process
that writes down while its cgroup is dirty. PR_SET_IO_FLUSHER exempts a process from both, but takes CAP_SYS_RESOURCE.

    no limit of memory                       as much as of a local disk (where only root can say so)
    a limit, and we are a flusher            a small part of the limit
    a limit, and we are not                  nothing is held: direct I/O

Source: prctl(2), Linux Documentation/ABI/testing/sysfs-class-bdi, mm/vmscan.c, mm/page-writeback.c.
"""

from __future__ import annotations

import ctypes
import logging
from contextlib import suppress
from dataclasses import replace

from qedfuse.fuse.options import MountOptions

_PR_SET_IO_FLUSHER = 57

#: Of a limit of memory, one part in so many may be unwritten data of one mount; at least so many bytes.
_PART = 16
_LEAST = 1 << 20

_log = logging.getLogger("qedfuse")


def become_flusher() -> bool:
    """Ask the kernel not to have this thread, and those that it starts later, wait for the write-back of anything while
    they are asked for memory. Returns whether it does: it takes CAP_SYS_RESOURCE."""
    done: int = ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    return done == 0


def fit_options(options: MountOptions, limit: int | None, *, flusher: bool) -> MountOptions:
    """The options of a mount that cannot hang for want of memory; `limit` is `memory_limit()`."""
    if limit is None or flusher or options.read_only or options.direct_io:
        return options
    _log.warning(
        "memory is limited to %d MiB and CAP_SYS_RESOURCE is missing: mounted with direct_io, since with a page cache "
        "the kernel and this process could wait for each other",
        limit >> 20,
    )
    return replace(options, direct_io=True)


def set_dirty_limit(device: str, limit: int | None) -> None:
    """Let the kernel keep as much unwritten data of this mount (its device is "MAJOR:MINOR") as of a local disk, or a
    small part of `limit`.

    By default it begins to slow writers down at 1% of what it would allow a disk, so that the daemon of an untrusted
    user cannot hold its memory. Only root can change that, and root's daemon may. What fsync promises is not touched.
    """
    if limit is None:
        settings = {"strict_limit": 0, "max_ratio": 100}
    else:
        settings = {"strict_limit": 1, "max_bytes": max(limit // _PART, _LEAST)}
    for name, value in settings.items():
        with suppress(OSError), open(f"/sys/class/bdi/{device}/{name}", "w") as file:
            file.write(str(value))
