"""The control socket: both sides of it, and clients that mean no good. No mount here but the last."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from qedfuse.cli.umount import _check_that_all_is_written
from qedfuse.daemon import control_server
from qedfuse.daemon.control import Client
from qedfuse.daemon.control_server import Call, Command, ControlServer
from qedfuse.daemon.protocol import MAX_REQUEST, VERSION
from qedfuse.daemon.rendezvous import abstract_name
from qedfuse.errors import QedfuseError
from qedfuse.host.mountinfo import Mount
from tests.helpers.mounts.mounts import mount_at, mounted
from tests.helpers.qemu.cli import environment, qemu_img

DEVICE = f"test:{os.getpid()}"


async def status(_call: Call) -> dict[str, Any]:
    return {"pid": 42}


async def other_status(_call: Call) -> dict[str, Any]:
    return {"pid": 43}


def mount(owner: int | None = None) -> Mount:
    options = f"rw,user_id={os.geteuid() if owner is None else owner}"
    return Mount(1, 0, DEVICE, "/", "/mnt", "fuse.qedfuse", "x", options)


def with_server(body: Callable[[ControlServer], Awaitable[None]], **commands: Command) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                server = ControlServer({"status": status, **commands})
                await server.listen(DEVICE)
                nursery.start_soon(server.serve)
                await body(server)
                server.stop_listening()
                await server.finish(None)

    trio.run(main)


def ask(command: str) -> dict[str, Any]:
    with Client(mount()) as client:
        return client.ask(command)


def test_questions_and_answers() -> None:
    async def body(server: ControlServer) -> None:
        assert await trio.to_thread.run_sync(ask, "status") == {"pid": 42}
        with pytest.raises(QedfuseError, match="its daemon refuses: unknown command"):
            await trio.to_thread.run_sync(ask, "nonsense")

    with_server(body)


@pytest.mark.parametrize("error", [None, "it went wrong"])
def test_whoever_waits_hears_of_the_end(error: str | None) -> None:
    async def body(server: ControlServer) -> None:
        clients = [await trio.to_thread.run_sync(lambda: Client(mount())) for _ in range(3)]
        for client in clients:
            assert await trio.to_thread.run_sync(client.ask, "wait") == {"waiting": True}
        server.stop_listening()
        with pytest.raises(QedfuseError, match="does not answer"):
            await trio.to_thread.run_sync(ask, "status")
        await server.finish(error)
        for client in clients:
            assert await trio.to_thread.run_sync(client.wait) == {"closed": True, "error": error}
            client.close()

    with_server(body)


def test_a_daemon_that_dies_is_noticed() -> None:
    async def body(server: ControlServer) -> None:
        with await trio.to_thread.run_sync(lambda: Client(mount())) as client:
            assert await trio.to_thread.run_sync(client.ask, "wait") == {"waiting": True}
            for stream in list(server._waiting):
                await stream.aclose()
            with pytest.raises(QedfuseError, match="has ended"):
                await trio.to_thread.run_sync(client.wait)

    with_server(body)


def test_who_loses_patience_is_forgotten() -> None:
    async def body(server: ControlServer) -> None:
        for _ in range(50):
            assert await trio.to_thread.run_sync(ask, "wait") == {"waiting": True}
        for _ in range(1000):
            if not server._waiting:
                return
            await trio.sleep(0.01)
        raise AssertionError("they are not forgotten")

    with_server(body)


def test_nobody_else_is_believed() -> None:
    """The address is taken by a process that is neither root nor the mount's owner."""
    if os.geteuid() == 0:
        script = (
            "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
            "s.bind(bytes.fromhex(sys.argv[1])); s.listen(); print(flush=True); s.accept(); sys.stdin.read()"
        )
        command = [sys.executable, "-c", script, abstract_name(DEVICE).hex()]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdout.readline()
            with pytest.raises(QedfuseError, match="somebody else"):
                Client(mount(owner=0))
            with Client(mount(owner=65534)):
                pass
            process.stdin.close()
            process.wait(20)
    else:
        pytest.skip("needs root to be somebody else")


def refused(answer: bytes) -> bool:
    """With a line that says so, or without a word."""
    return not answer or (json.loads(answer).keys() == {"version", "error"} and answer.endswith(b"\n"))


def test_nonsense_is_survived() -> None:
    def send(data: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(abstract_name(DEVICE))
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                return connection.recv(1000)
            except (BrokenPipeError, ConnectionResetError):
                return b""

    async def body(server: ControlServer) -> None:
        for data in (
            b"",
            b"{}\n",
            b"[]\n",
            b"null\n",
            b"\xff\n",
            b'{"command": 5}\n',
            b'{"command": []}\n',
            b'{"command": "status", "version": null}\n',
            b'{"command": "status", "version": 1e400}\n',
            b'{"command": "status", "arguments": []}\n',
            b'{"command": "status", "detached": 1}\n',
            b"{" * 3000,
        ):
            assert refused(await trio.to_thread.run_sync(send, data)), data
        assert await trio.to_thread.run_sync(send, b"x" * (MAX_REQUEST * 100)) == b""
        assert refused(await trio.to_thread.run_sync(send, b"[" * 4000 + b"\n"))
        assert await trio.to_thread.run_sync(ask, "status") == {"pid": 42}

    with_server(body)


# -- answers that come one by one, arguments, versions ----------------------------------------------------------------


def connect() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(abstract_name(DEVICE))
    return connection


class Counting:
    """A command that counts, as far as its argument says, and notices when it is cancelled."""

    def __init__(self, pause: float = 0.0) -> None:
        self.ended = trio.Event()
        self.cancelled = False
        self._pause = pause

    async def __call__(self, call: Call) -> dict[str, Any]:
        try:
            for number in range(call.arguments["to"]):
                await call.send({"number": number})
                await trio.sleep(self._pause)
        except trio.Cancelled:
            self.cancelled = True
            raise
        finally:
            self.ended.set()
        return {"counted": True}


def test_answers_come_one_by_one() -> None:
    def follow() -> list[dict[str, Any]]:
        with Client(mount()) as client:
            return list(client.follow("count", to=3))

    async def body(server: ControlServer) -> None:
        answers = await trio.to_thread.run_sync(follow)
        assert answers == [{"number": 0}, {"number": 1}, {"number": 2}, {"counted": True}]

    with_server(body, count=Counting())


@pytest.mark.parametrize("detached", [False, True])
def test_what_was_asked_for_ends_with_its_client_unless_it_is_detached(detached: bool) -> None:
    counting = Counting(0.01)

    def begin() -> None:
        with Client(mount()) as client:
            assert next(client.follow("count", detached=detached, to=100)) == {"number": 0}

    async def body(server: ControlServer) -> None:
        await trio.to_thread.run_sync(begin)
        await counting.ended.wait()
        assert counting.cancelled is not detached

    with_server(body, count=counting)


def test_a_client_that_sends_no_more_waits_for_its_answer() -> None:
    counting = Counting(0.4)

    def ask_half() -> list[bytes]:
        with connect() as connection:
            connection.sendall(b'{"version": 2, "command": "count", "arguments": {"to": 1}}\n')
            connection.shutdown(socket.SHUT_WR)
            return connection.makefile("rb").readlines()

    def leave() -> None:
        with connect() as connection:
            connection.sendall(b'{"version": 2, "command": "count", "arguments": {"to": 1000}}\n')
            connection.shutdown(socket.SHUT_WR)

    async def body(server: ControlServer) -> None:
        assert (await trio.to_thread.run_sync(ask_half))[-1] == b'{"counted": true}\n'
        assert not counting.cancelled
        counting.ended = trio.Event()
        await trio.to_thread.run_sync(leave)
        await counting.ended.wait()
        assert counting.cancelled

    with_server(body, count=counting)


def test_a_client_that_takes_no_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "_PATIENCE", 0.2)
    flooded = trio.Event()

    async def flood(call: Call) -> dict[str, Any]:
        for _ in range(100):
            await call.send({"text": "x" * 1_000_000})
        flooded.set()
        return {}

    async def body(server: ControlServer) -> None:
        with await trio.to_thread.run_sync(connect) as connection:
            connection.sendall(b'{"version": 2, "command": "flood"}\n')
            await flooded.wait()
            assert await trio.to_thread.run_sync(ask, "status") == {"pid": 42}

    with_server(body, flood=flood)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("to"), "internal error: KeyError: 'to'; this is a bug"),
        (OSError(errno.ENOSPC, "No space left on device", "disk.qed"), "disk.qed: no space left on device"),
    ],
)
def test_a_command_that_fails_ends_nothing_else(error: Exception, told: str) -> None:
    async def fail(_call: Call) -> dict[str, Any]:
        raise error

    async def fail_later(call: Call) -> dict[str, Any]:
        await call.send({"number": 1})
        raise error

    def expect_failure() -> None:
        with Client(mount()) as client, pytest.raises(QedfuseError) as asked:
            client.ask("fail")
        with Client(mount()) as client:
            answers = client.follow("fail_later")
            assert next(answers) == {"number": 1}
            with pytest.raises(QedfuseError) as followed:
                next(answers)
        for caught in (asked, followed):
            assert (caught.value.path, caught.value.message) == (mount().mountpoint, told)

    async def body(server: ControlServer) -> None:
        await trio.to_thread.run_sync(expect_failure)
        assert await trio.to_thread.run_sync(ask, "status") == {"pid": 42}

    with_server(body, fail=fail, fail_later=fail_later)


def test_what_could_not_be_flushed_is_not_unmounted() -> None:
    """A flush that comes to nothing is no flush that found nothing to say."""

    async def fail(_call: Call) -> dict[str, Any]:
        raise ZeroDivisionError

    async def body(server: ControlServer) -> None:
        with pytest.raises(QedfuseError, match="internal error: ZeroDivisionError"):
            await trio.to_thread.run_sync(_check_that_all_is_written, mount(), "/mnt")

    with_server(body, flush=fail)


def test_versions_before_and_after() -> None:
    def say(line: str) -> dict[str, Any]:
        with connect() as connection:
            connection.sendall(line.encode() + b"\n")
            answer = json.loads(connection.makefile("rb").readline())
            assert isinstance(answer, dict)
            return answer

    async def body(server: ControlServer) -> None:
        assert await trio.to_thread.run_sync(say, '{"command": "status"}') == {"pid": 42}
        answer = await trio.to_thread.run_sync(say, '{"command": "status", "version": 3}')
        assert answer == {
            "version": VERSION,
            "error": "it speaks version 2 of the protocol, and is older than this command",
        }

    with_server(body)


def test_a_daemon_of_the_first_version_is_told_apart() -> None:
    def serve_one(listener: socket.socket) -> None:
        connection, _address = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b'{"error": "unknown command"}\n')

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(abstract_name(DEVICE))
        listener.listen()
        thread = threading.Thread(target=serve_one, args=(listener,))
        thread.start()
        with pytest.raises(QedfuseError, match="its daemon is older than this command, and does not know it"):
            ask("jobs")
        thread.join()


def test_silent_clients_do_not_keep_it_from_ending() -> None:
    async def body(server: ControlServer) -> None:
        silent = [socket.socket(socket.AF_UNIX) for _ in range(10)]
        for connection in silent:
            connection.connect(abstract_name(DEVICE))
        await trio.sleep(0.01)
        for connection in silent:
            connection.close()

    with_server(body)


def test_the_address_of_a_predecessor_is_waited_for() -> None:
    async def body(server: ControlServer) -> None:
        successor = ControlServer({"status": other_status})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(successor.listen, DEVICE)
            await trio.sleep(0.05)
            server.stop_listening()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(successor.serve)
            assert await trio.to_thread.run_sync(ask, "status") == {"pid": 43}
            successor.stop_listening()

    with_server(body)


def test_without_an_address_it_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*args: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(control_server, "_BIND_PATIENCE", 0.05)

    async def body(server: ControlServer) -> None:
        other = ControlServer({"status": other_status})
        monkeypatch.setattr(control_server, "bind", bind)
        await other.listen(DEVICE)
        await other.serve()
        other.stop_listening()
        assert await trio.to_thread.run_sync(ask, "status") == {"pid": 42}

    with_server(body)


def test_a_mount_survives_nonsense(tmp_path: Path) -> None:
    image, raw = tmp_path / "disk.qed", tmp_path / "disk.raw"
    qemu_img("create", "-q", "-f", "qed", image, "1M")
    raw.touch()
    with mounted(image, raw):
        found = mount_at(raw)
        assert found is not None
        for data in (b"x" * 100_000, b"", b"{}\n", b"\0\n"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(abstract_name(found.device))
                try:
                    connection.sendall(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass
        with Client(found) as client:
            assert client.ask("status")["mountpoint"] == str(raw)
        assert len(raw.read_bytes()) == 1 << 20
