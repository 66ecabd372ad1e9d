"""The process outside: it may use the mount, which the daemon may not, since a daemon would wait for itself.

The kernel must be told two things by somebody who uses the mount, both about a file mount with the writeback cache,
where the kernel is itself the master of size and time of change, and takes both from the file system when it looks a
file up. The root of a mount is never looked up:

- it believes that the root's size is 0 until somebody truncates it;
- it does not keep the root's time of change (the root exists before the cache is agreed on), so somebody has to set it.

A thread of the daemon would do, too, but for SIGKILL: a thread that waits for its own dead process never ends. The
process is forked before there is any thread, and ends with the daemon, whose end of the socket pair it watches.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import suppress
from typing import Any

import trio

from qedfuse.errors import QedfuseError, describe

#: Seconds that setting the times may take.
_PATIENCE = 2.0


class Outside:
    """The daemon's side; a context manager that ends the process. `closing`: descriptors of the daemon that the process
    must not hold open."""

    def __init__(self, mountpoint: str, closing: list[int]) -> None:
        ours, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                ours.close()
                _serve(theirs, mountpoint, closing)
            finally:
                os._exit(0)
        theirs.close()
        self._mountpoint = mountpoint
        self._socket = ours
        self._busy = False
        self._late = False  # an answer that nobody waits for any more is still to come

    async def settle(self, size: int | None, times: tuple[int, int] | None) -> None:
        """Use the mount for the first time; see `_settle`. Raises QedfuseError if it is not what it should be."""
        error = await self._ask({"size": size, "times": times})
        if error is not None:
            raise QedfuseError("", f"mounted, but not usable: {error}")

    async def set_times(self, times: tuple[int, int]) -> bool:
        """Tell the kernel atime and mtime (nanoseconds) of a file mount. Returns whether it was done: not while another
        call does it, and not if it takes too long (somebody waits for a slow disk with the file locked, or nobody
        answers the kernel's requests any more); then it does nothing until the process has come back."""
        if self._busy or not self._is_back():
            return False
        with trio.move_on_after(_PATIENCE):
            await self._ask({"size": None, "times": times})
            return True
        return False

    def _is_back(self) -> bool:
        """Whether the process has answered all that it was asked."""
        if self._late:
            with suppress(BlockingIOError):
                self._late = not self._socket.recv(65536, socket.MSG_DONTWAIT).endswith(b"\n")
        return not self._late

    async def _ask(self, request: dict[str, Any]) -> str | None:
        """The process's answer: None or what went wrong. After a cancellation see `_is_back`."""
        self._busy = True
        try:
            return await self._exchange(request)
        except trio.Cancelled:
            self._busy = False
            self._late = True
            raise

    async def _exchange(self, request: dict[str, Any]) -> str | None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._socket.dup()))
        async with stream:
            await stream.send_all(json.dumps(request).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                piece = await stream.receive_some(65536)
                if not piece:
                    raise QedfuseError(self._mountpoint, "the process outside has ended")
                answer += piece
        self._busy = False
        error: str | None = json.loads(answer)["error"]
        return error

    def close(self) -> None:
        """Let the process end; waits for that, which takes no time while no request is under way. Idempotent."""
        self._busy = True
        self._socket.close()
        if self._pid:
            os.waitpid(self._pid, 0)
            self._pid = 0

    def __enter__(self) -> Outside:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _serve(link: socket.socket, mountpoint: str, closing: list[int]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # those are for the daemon
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for fd in closing:
        os.close(fd)
    with link, link.makefile("rb") as requests:
        for line in requests:
            try:
                _settle(mountpoint, **json.loads(line))
                error = None
            except OSError as problem:
                error = describe(problem)
            link.sendall(json.dumps({"error": error}).encode() + b"\n")


def _settle(mountpoint: str, size: int | None, times: list[int] | None) -> None:
    """Tell the kernel `times`, and also the size (bytes) if that is given; `size` alone must be right already."""
    if times is not None:
        if size is not None:
            os.truncate(mountpoint, size)
        os.utime(mountpoint, ns=(times[0], times[1]))
    if size is not None or times is None:
        status = os.stat(mountpoint)
        if size is not None and status.st_size != size:
            raise QedfuseError(mountpoint, f"the kernel shows {status.st_size} bytes instead of {size}")
