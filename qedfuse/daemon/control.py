"""How a command talks to the daemon of a mount: the commands' side. No event loop. `protocol.py` has what is said.

The daemon listens on a Unix socket that is found by the mount's owner and device number (see `rendezvous.py`), which
every process finds in mountinfo. Both sides look at the other one's user: the daemon answers root and its own user, a
command believes root and the mount's owner.

When the daemon has left the kernel and closes the images it stops listening, but keeps the clients that wait. A daemon
with a /run and a /tmp of its own is found by its abstract socket, which there is for that. Source: unix(7).
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from qedfuse.daemon.protocol import MAX_ANSWER, Request, why_failed, why_refused
from qedfuse.daemon.rendezvous import abstract_name, find
from qedfuse.errors import QedfuseError
from qedfuse.host.mountinfo import Mount

if TYPE_CHECKING:
    import trio

#: Seconds that a daemon has for an answer that needs no waiting.
_PATIENCE = 30.0

_UCRED = struct.Struct("3i")


def peer_uid(connection: socket.socket | trio.socket.SocketType) -> int:
    """The user at the other end. Source: SO_PEERCRED."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(raw)[1])


class Client:
    """A connection to the daemon of `mount`. Raises QedfuseError if there is none to be had within `seconds`."""

    def __init__(self, mount: Mount, seconds: float = _PATIENCE) -> None:
        self._path = mount.mountpoint
        self._socket = _connect(mount, seconds)
        self._socket.settimeout(seconds)
        self._lines = self._socket.makefile("rb")
        self._more = False  # whether the last answer was not the last one

    def ask(self, command: str, seconds: float | None = _PATIENCE, **arguments: Any) -> dict[str, Any]:
        """Send a command; its first answer, which must come within `seconds` if that is not None. Raises QedfuseError,
        also if the daemon does not know the command or the command fails."""
        self._send(Request(command, arguments), seconds)
        return self._receive()

    def follow(self, command: str, *, detached: bool = False, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Send a command; its answers as they come, to the last. `detached`: it goes on when this connection ends.
        Raises QedfuseError as `ask`."""
        self._send(Request(command, arguments, detached), _PATIENCE)
        self._socket.settimeout(None)
        self._more = True
        while self._more:
            yield self._receive()

    def _send(self, request: Request, seconds: float | None) -> None:
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(request.encode())
        except OSError as error:
            raise QedfuseError(self._path, "its daemon is gone", error.errno) from None

    def wait(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next answer, however long it takes; None if none has come after `seconds`."""
        if not select.select([self._socket], [], [], seconds)[0]:
            return None
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.readline(MAX_ANSWER)
        except TimeoutError:
            raise QedfuseError(self._path, "its daemon does not answer in time") from None
        except OSError as error:
            raise QedfuseError(self._path, "its daemon is gone", error.errno) from None
        if not line:
            raise QedfuseError(self._path, "its daemon has ended without an answer (does root or you own the mount?)")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise QedfuseError(self._path, "its daemon answers nonsense")
        if (reason := why_refused(answer) or why_failed(answer)) is not None:
            raise QedfuseError(self._path, reason)
        self._more = bool(answer.pop("more", False))
        return answer

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def _connect(mount: Mount, seconds: float) -> socket.socket:
    """A connection to the daemon of `mount`. Raises QedfuseError."""
    owner = mount.owner or 0
    strangers = False
    code = None
    addresses: Iterator[str | bytes] = chain(find(owner, mount.device), (abstract_name(mount.device),))
    for address in addresses:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _wait_for_turn(connection, address, seconds)
            if peer_uid(connection) in (0, owner):
                return connection
            strangers = True
        except OSError as error:
            code = error.errno
        connection.close()
    if strangers:
        raise QedfuseError(mount.mountpoint, "somebody else listens in place of its daemon")
    raise QedfuseError(mount.mountpoint, "its daemon does not answer", code)


def _wait_for_turn(connection: socket.socket, address: str | bytes, seconds: float) -> None:
    """Connect, also if many others wait for the daemon. Raises OSError."""
    deadline = time.monotonic() + seconds
    connection.setblocking(False)
    while True:
        try:
            connection.connect(address)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
