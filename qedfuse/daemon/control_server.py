"""The daemon's side of the control socket; see `control.py`, and `protocol.py` for what is said."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from qedfuse.daemon.control import peer_uid
from qedfuse.daemon.protocol import MAX_REQUEST, Refused, decode, encode, failure, refusal, unknown
from qedfuse.daemon.rendezvous import Address, abstract_name, bind
from qedfuse.text import describe, printable

#: Seconds: for a client to ask, to take an answer, and for a predecessor with our device number to vanish.
_PATIENCE = 10.0
_BIND_PATIENCE = 3.0
#: Seconds between two looks at a client that will send no more.
_GONE_PERIOD = 0.25
#: Clients that may wait to be accepted.
_BACKLOG = 128

_log = logging.getLogger("qedfuse")


class Call:
    """A request that is being carried out. `arguments`: of any types."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.arguments: Mapping[str, Any] = {}
        self._stream = stream
        self._gone = False

    async def send(self, answer: Mapping[str, Any], *, last: bool = False) -> None:
        """An answer, which `more` of them follow if it is not the `last`. One that the client does not take in time, or
        at all, is lost, and so are those that follow."""
        if self._gone:
            return
        self._gone = True
        with trio.move_on_after(_PATIENCE), contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_all(encode(answer if last else {**answer, "more": True}))
            self._gone = False


#: Returns the last answer; raises OSError, which the client gets. Cancelled when its client goes away.
Command = Callable[[Call], Awaitable[dict[str, Any]]]


class ControlServer:
    """Answers requests by `commands`, and tells those that wait for the mount when all is closed."""

    def __init__(self, commands: dict[str, Command]) -> None:
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
        last one may be closing its images still, so it may be taken for a moment; or a stranger has taken it."""
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
        """Keep a descriptor for a client that asks when open images have taken all others."""
        if self._spare is None:
            with contextlib.suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def stop_listening(self) -> None:
        """Free the addresses; clients that wait go on waiting."""
        if self._address is not None:
            self._address.release()
            self._address = None
        for listener in self._listeners:
            listener.socket.close()
        self._scope.cancel()

    async def dismiss(self, error: str) -> None:
        """Tell the clients that wait that it would be for long. Once it has stopped listening."""
        waiting, self._waiting = self._waiting, set()
        await self._send({"closed": False, "error": error}, waiting)

    async def finish(self, error: str | None) -> None:
        """Tell the clients that wait how it ended."""
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
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                if peer_uid(stream.socket) in (0, os.geteuid()):
                    await self._handle(stream)
            self._waiting.discard(stream)
        finally:
            if stream not in self._waiting:
                await trio.aclose_forcefully(stream)
        self._keep_spare()

    async def _handle(self, stream: trio.SocketStream) -> None:
        """One request, from its first byte to the last answer."""
        line = await _receive_line(stream)
        if line is None:
            return
        call = Call(stream)
        try:
            request = decode(line)
            if request.command == "wait":
                await self._wait(stream, call)
                return
            command = self._commands.get(request.command)
            if command is None:
                raise unknown()
        except Refused as refused:
            await call.send(refusal(refused), last=True)
            return
        call.arguments = request.arguments
        async with trio.open_nursery() as nursery:
            if not request.detached:
                nursery.start_soon(_cancel_when_gone, stream, nursery.cancel_scope)
            await call.send(await _run(command, call, request.command), last=True)
            nursery.cancel_scope.cancel()

    async def _wait(self, stream: trio.SocketStream, call: Call) -> None:
        """It is under way until the client loses patience, or `finish` has told it."""
        self._waiting.add(stream)
        await call.send({"waiting": True})
        await stream.receive_some(1)


async def _receive_line(stream: trio.SocketStream) -> bytes | None:
    """None: there is none, or not in time, or it is too long."""
    line = bytearray()
    with trio.move_on_after(_PATIENCE):
        while not line.endswith(b"\n"):
            piece = await stream.receive_some(MAX_REQUEST)
            if not piece or len(line) > MAX_REQUEST:
                return None
            line += piece
    return bytes(line)


async def _run(command: Command, call: Call, name: str) -> dict[str, Any]:
    """The last answer. What a command raises ends nothing but the command."""
    try:
        return await command(call)
    except OSError as error:
        return failure(describe(error))
    except Exception as error:
        _log.error("control socket: %s: internal error", printable(name), exc_info=error)
        return failure(f"internal error: {type(error).__name__}: {error}; this is a bug")


async def _cancel_when_gone(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Cancel when the client has closed its connection. One that has only closed its half of it waits for an answer,
    and nothing wakes us when it goes: have a look now and then."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while await stream.receive_some(MAX_REQUEST):
            pass
        poll = select.poll()
        poll.register(stream.socket.fileno(), 0)  # POLLHUP is always asked for
        while True:
            if poll.poll(0):
                break
            await trio.sleep(_GONE_PERIOD)
    scope.cancel()
