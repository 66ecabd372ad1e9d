"""How a command talks to the daemon of a mount: what is said, and the commands' side. No event loop.

The daemon listens on an abstract Unix socket named after the mount's device number, which every process finds in
mountinfo. Both sides look at who the other one is: the daemon answers root and its own user, a command believes root
and the mount's owner. Requests and answers are JSON objects, one a line:

    {"command": "status"}  ->  {"pid": ..., "mountpoint": ..., "images": [...], ...}
    {"command": "flush"}   ->  {"error": null | text, "unwritten": null | text}, when all that was completed is durable;
                               "unwritten" is what may be written yet (no space), "error" is all that went wrong
    {"command": "wait"}    ->  {"waiting": true}, and when all is closed: {"closed": true, "error": null | text};
                               if it cannot be, for some time: {"closed": false, "error": text}

When the daemon has left the kernel and closes the images it stops listening, but keeps those who wait.

Abstract sockets belong to a network namespace: from another one there is no answer. Source: unix(7).
"""

from __future__ import annotations

import json
import select
import socket
import struct
from typing import TYPE_CHECKING, Any

from qedfuse.errors import QedfuseError
from qedfuse.mounts import Mount

if TYPE_CHECKING:
    import trio

#: Bytes of a request, and of an answer (it lists the images).
MAX_REQUEST = 4096
_MAX_ANSWER = 64 << 20
#: Seconds that a daemon has for an answer that needs no waiting.
_PATIENCE = 30.0

_UCRED = struct.Struct("3i")


def socket_name(device: str) -> bytes:
    """The abstract address for a mount's "major:minor"."""
    return b"\0qedfuse-" + device.encode("ascii")


def peer_uid(connection: socket.socket | trio.socket.SocketType) -> int:
    """The user at the other end. Source: SO_PEERCRED."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(raw)[1])


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


class Client:
    """A connection to the daemon of `mount`. Raises QedfuseError if there is none to be had."""

    def __init__(self, mount: Mount) -> None:
        self._path = mount.mountpoint
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_PATIENCE)
            self._socket.connect(socket_name(mount.device))
            if peer_uid(self._socket) not in (0, mount.owner):
                raise QedfuseError(self._path, "somebody else listens in place of its daemon")
            self._lines = self._socket.makefile("rb")
        except OSError as error:
            self._socket.close()
            if isinstance(error, QedfuseError):
                raise
            raise QedfuseError(self._path, "its daemon does not answer", error.errno) from None

    def ask(self, command: str, seconds: float | None = _PATIENCE) -> dict[str, Any]:
        """Send a command; its first answer, which must come within `seconds` if that is not None."""
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(encode({"command": command}))
        except OSError as error:
            raise QedfuseError(self._path, "its daemon is gone", error.errno) from None
        return self._receive()

    def wait(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next answer, however long it takes; None if none has come after `seconds`."""
        if not select.select([self._socket], [], [], seconds)[0]:
            return None
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.readline(_MAX_ANSWER)
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
        return answer

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
