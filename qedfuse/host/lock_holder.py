"""Which process has locked a byte of a file: for messages.

Source: proc(5) on fdinfo.
"""

from __future__ import annotations

import os


def find_holder(fd: int, byte: int) -> int | None:
    """The pid of a process with a lock on `byte`, as far as we may look into others.

    The kernel names no owner of such a lock (it may be shared by several), but lists each descriptor's in fdinfo. The
    files themselves are left alone: one may lie in a mount that this very process serves, and that would wait for us.
    """
    inode = os.fstat(fd).st_ino
    ours = os.getpid(), fd
    for pid in _numbers("/proc"):
        for number in _numbers(f"/proc/{pid}/fdinfo"):
            try:
                if (pid, number) != ours and _has_lock(pid, number, inode, byte):
                    return pid
            except OSError:  # it was closed meanwhile
                continue
    return None


def _has_lock(pid: int, number: int, inode: int, byte: int) -> bool:
    """Whether a line like `lock: 1: OFDLCK ADVISORY READ -1 fe:00:2146512 100 101` is for the file and the byte.

    The device is not compared: with some file systems (btrfs) it is another one than stat(2) gives.
    """
    with open(f"/proc/{pid}/fdinfo/{number}", encoding="utf-8") as info:
        for line in info:
            words = line.split()
            if words[:1] == ["lock:"] and words[-3].endswith(f":{inode}"):
                first, last = words[-2:]
                if int(first) <= byte and (last == "EOF" or byte <= int(last)):
                    return True
    return False


def _numbers(directory: str) -> list[int]:
    try:
        return [int(name) for name in os.listdir(directory) if name.isdecimal()]
    except OSError:  # another user's process, or gone
        return []


def name_of(pid: int) -> str:
    """The command of a process, and a comma; nothing if it is not to be known."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            name = comm.read().strip()
    except OSError:
        return ""
    return f"{name}, " if name.isprintable() else ""
