"""How many requests the kernel hands out at a time, and more of them while some wait for a remote host.

Source: Linux Documentation/filesystems/fuse.rst on max_background.
"""

from __future__ import annotations

import os
from contextlib import suppress

import trio

from qedfuse.fuse.connection import open_control
from qedfuse.host.remote_file import waiting

#: Seconds that a request may wait for a remote host before there must be room for more.
_LONG = 0.5


async def make_room(device: str) -> None:
    """Requests that wait for a remote host take the room of all others in the kernel, so there must be more of it.
    Not from the start: each has memory of its own here. `device` is the mount's "MAJOR:MINOR"."""
    limit = _Limit(device)
    if limit.usual is None:
        return
    while True:
        await waiting.some.wait()
        now = limit.usual
        while waiting.count:
            await trio.sleep(_LONG)
            if limit.usual + waiting.count > now:
                now = limit.usual + 4 * waiting.count
                limit.set(now)
        limit.set(limit.usual)


class _Limit:
    """How many requests the kernel hands out at a time that no process waits for one by one: readahead, direct reads
    and writes, writing back. By default it is 12, for all files together.

    `usual`: what it is by itself; None if it cannot be changed.
    """

    def __init__(self, device: str) -> None:
        self.usual: int | None = None
        self._fd = open_control(device, "max_background", os.O_WRONLY)
        # Another descriptor to read: one cannot go back in it, and writes at its start alone.
        fd = open_control(device, "max_background", os.O_RDONLY)
        if fd >= 0:
            with suppress(OSError, ValueError):
                self.usual = int(os.read(fd, 20))
            os.close(fd)

    def set(self, limit: int) -> None:
        with suppress(OSError):
            os.write(self._fd, b"%d" % limit)
