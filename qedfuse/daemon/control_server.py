"""The daemon's side of the control socket; see `control.py`."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from qedfuse.daemon.control import MAX_REQUEST, encode, peer_uid
from qedfuse.daemon.rendezvous import Address, abstract_name, bind
from qedfuse.text import describe

#: Seconds: for a client to ask, to take an answer, and for a predecessor with our device number to vanish.
_PATIENCE = 10.0
_BIND_PATIENCE = 3.0
#: Clients that may wait to be accepted.
_BACKLOG = 128

_log = logging.getLogger("qedfuse")


class ControlServer:
    """Answers questions about a mount by `commands`, and tells who waits for it when all is closed."""

    def __init__(self, commands: dict[str, Callable[[], Awaitable[dict[str, Any]]]]) -> None:
        self._commands = commands
        self._address: Address | None = None
        self._listeners: list[trio.SocketListener] = []
        self._scope = trio.CancelScope()
        self._spare: int | None = None
        self._waiting: set[trio.SocketStream] = set()

    async def listen(self, device: str) -> None:
        """Take the addresses of the mount with this device number: the one that is its owner's alone, and the abstract
        one for commands that do not see our directories."""
        try:
            self._listen_in_directory(device)
        except OSError as error:
            _log.warning("no directory for the control socket (%s)", describe(error))
        if not await self._listen_abstract(device) and self._address is None:
            _log.warning("no control socket: qedfuse umount and status will not work")

    def _listen_in_directory(self, device: str) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._address = bind(listener, device, _BACKLOG)
        except OSError:
            listener.close()
            raise
        self._listeners.append(trio.SocketListener(trio.socket.from_stdlib_socket(listener)))

    async def _listen_abstract(self, device: str) -> bool:
        """Whether the address could be had. The kernel gives a device number to the next mount while the daemon of the
        last one may be closing its images still, so it may be taken for a moment; or somebody has taken it."""
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        deadline = trio.current_time() + (_BIND_PATIENCE if self._address is None else 0)
        while True:
            try:
                await listener.bind(abstract_name(device))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or trio.current_time() > deadline:
                    listener.close()
                    return False
                await trio.sleep(0.02)
        listener.listen(_BACKLOG)
        self._listeners.append(trio.SocketListener(listener))
        return True

    async def serve(self) -> None:
        """Answer until `stop_listening`."""
        self._keep_spare()
        with self._scope:
            async with trio.open_nursery() as nursery:
                for listener in self._listeners:
                    nursery.start_soon(self._accept, listener, nursery)

    async def _accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        while True:
            try:
                stream = await listener.accept()
            except trio.ClosedResourceError:
                return
            except OSError as error:
                if self._spare is not None:
                    os.close(self._spare)
                    self._spare = None
                    continue
                _log.warning("control socket: %s", error)
                await trio.sleep(1)
                continue
            nursery.start_soon(self._answer, stream)

    def _keep_spare(self) -> None:
        """Keep a descriptor for somebody who asks when open images have taken all others."""
        if self._spare is None:
            with contextlib.suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def stop_listening(self) -> None:
        """Free the addresses; whoever waits goes on waiting."""
        if self._address is not None:
            self._address.release()
            self._address = None
        for listener in self._listeners:
            listener.socket.close()
        self._scope.cancel()

    async def dismiss(self, error: str) -> None:
        """Tell those who wait that they would wait for long. Once it has stopped listening."""
        waiting, self._waiting = self._waiting, set()
        await self._send({"closed": False, "error": error}, waiting)

    async def finish(self, error: str | None) -> None:
        """Tell those who wait how it ended."""
        await self._send({"closed": True, "error": error}, set(self._waiting))

    async def _send(self, answer: dict[str, Any], streams: set[trio.SocketStream]) -> None:
        with trio.move_on_after(_PATIENCE):
            for stream in streams:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await stream.send_all(encode(answer))
        for stream in streams:
            await trio.aclose_forcefully(stream)

    async def _answer(self, stream: trio.SocketStream) -> None:
        """Serve one connection. It stays open for `finish` if its client waits when this is cancelled."""
        try:
            if peer_uid(stream.socket) in (0, os.geteuid()):
                await self._handle(stream)
        except trio.Cancelled:
            if stream not in self._waiting:
                await trio.aclose_forcefully(stream)
            raise
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self._waiting.discard(stream)
        await trio.aclose_forcefully(stream)
        self._keep_spare()

    async def _handle(self, stream: trio.SocketStream) -> None:
        """Answer one request; one that waits is under way until the client loses patience."""
        request = bytearray()
        with trio.move_on_after(_PATIENCE):
            while not request.endswith(b"\n"):
                piece = await stream.receive_some(MAX_REQUEST)
                if not piece or len(request) > MAX_REQUEST:
                    return
                request += piece
        try:
            command = json.loads(request).get("command")
        except (ValueError, AttributeError, RecursionError):
            command = None
        run = self._commands.get(command) if isinstance(command, str) else None
        answer: dict[str, Any]
        if command == "wait":
            self._waiting.add(stream)
            answer = {"waiting": True}
        elif run is not None:
            answer = await run()
        else:
            answer = {"error": "unknown command"}
        with trio.move_on_after(_PATIENCE):
            await stream.send_all(encode(answer))
        if stream in self._waiting:
            await stream.receive_some(1)
