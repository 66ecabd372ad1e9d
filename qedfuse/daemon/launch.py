"""Starting a daemon in the background: the process that the user started ends when the mount is usable, or says why.

The daemon is forked before there is any thread or event loop. It reports through a socket pair, one JSON line:
{"ready": true} or {"failed": text, "exit_code": n}.

It leaves its caller's session only when the mount is usable: autofs, and systemd's automount, let nothing but their own
process group look at a mountpoint whose mount is still to come, and would have anything else wait for that mount. Until
then a terminal's signals reach the daemon as well as the process that waits for it. Source: daemon(7), Linux
Documentation/filesystems/autofs.rst ("oz_pgrp").
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress

from qedfuse.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, QedfuseError, leaves
from qedfuse.host.limits import explain_shortage
from qedfuse.text import describe

_log = logging.getLogger("qedfuse")


def open_standard_files() -> None:
    """Make sure that descriptors 0 to 2 are taken, so that none of ours gets such a number: a caller may have closed
    them, and all of them are replaced when the daemon leaves its caller."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)


def inherited_descriptors(named: Iterable[str]) -> list[int]:
    """The descriptors behind 2 that the caller has left open, but for those that the paths `named` stand for. To be
    called before any is opened here."""
    kept = {int(found[1]) for path in named if (found := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", path))}
    fds = {int(name) for name in os.listdir("/proc/self/fd")} - kept
    return sorted(fd for fd in fds if fd > 2 and _is_open(fd))


def _is_open(fd: int) -> bool:
    """Not the one by which the directory was read."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class MountFailed(QedfuseError):
    """The daemon's reason, told by the process that the user started."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__("", message)
        self.exit_code = exit_code


class Link:
    """The daemon's end."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def report_ready(self) -> None:
        """The mount is usable: the process that waits for it may end, and so may one that waits for the end of its
        output. The daemon has nothing to do with either any more."""
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        if null > 2:
            os.close(null)
        self._tell({"ready": True})

    def report_failure(self, line: str, exit_code: int) -> None:
        """There will be no mount."""
        self._tell({"failed": line, "exit_code": exit_code})

    def _tell(self, message: dict[str, object]) -> None:
        try:
            self._link.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # the process that waited has ended
        self._link.close()


def run_in_background(serve: Callable[[Link], int], closing: Iterable[int]) -> int:
    """Run `serve` in a process of its own, without the descriptors `closing`, and from when it reports that the mount
    is usable in a session of its own; what it raises is told, or logged if no process listens any more. Returns when
    the mount is usable; raises MountFailed if it never will be."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        code = EXIT_FAILED
        try:
            for fd in closing:
                with suppress(OSError):
                    os.close(fd)
            os.chdir("/")
            code = _serve(serve, Link(theirs))
        finally:
            os._exit(code)
    theirs.close()
    try:
        with ours, ours.makefile("rb") as lines:
            line = lines.readline()
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    if not line:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        raise MountFailed(f"the daemon has ended {how} before the mount was usable", EXIT_FAILED)
    message = json.loads(line)
    if "failed" in message:
        os.waitpid(pid, 0)  # all is cleaned up then
        raise MountFailed(message["failed"], message["exit_code"])
    return EXIT_OK


def _serve(serve: Callable[[Link], int], link: Link) -> int:
    try:
        return serve(link)
    except BaseException as error:
        line, code = _explain(error)
        _log.error("%s", line, exc_info=error if code is None else None)
        link.report_failure(line, code or EXIT_FAILED)
        return code or EXIT_FAILED


def _explain(error: BaseException) -> tuple[str, int | None]:
    """One line, and the exit code; None for a bug."""
    error = next(leaves(error))
    if (shortage := explain_shortage(error)) is not None:
        return shortage, EXIT_FAILED
    if isinstance(error, QedfuseError):
        return describe(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(error, OSError):
        return describe(error), EXIT_FAILED
    return f"internal error: {type(error).__name__}: {error}; this is a bug (-f shows where)", None
