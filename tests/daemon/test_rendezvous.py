"""Where daemon and command meet, and strangers who are there before or at the same time."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from qedfuse.daemon import control, rendezvous
from qedfuse.daemon.control import Client
from qedfuse.daemon.control_server import Call, ControlServer
from qedfuse.daemon.rendezvous import abstract_name, bind, file_name, find
from qedfuse.errors import QedfuseError
from qedfuse.host.mountinfo import Mount
from tests.helpers.mounts.mounts import find_daemon, kill, mount_at, mounted, new_namespace, wait_for_exit
from tests.helpers.qemu.cli import Result, environment, qedfuse, qemu_img

DEVICE = f"test:{os.getpid()}"
NOBODY = 65534


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/run, /run/user and /tmp of our own."""
    tmp_path.chmod(0o755)
    for name, mode in (("run", 0o755), ("user", 0o755), ("tmp", 0o1777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    monkeypatch.setattr(rendezvous, "_ROOT", str(tmp_path / "run/qedfuse"))
    monkeypatch.setattr(rendezvous, "_USERS", str(tmp_path / "user"))
    monkeypatch.setattr(rendezvous, "_TEMPORARY", str(tmp_path / "tmp"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(control, "_PATIENCE", 3.0)
    return tmp_path


@contextmanager
def listening(backlog: int = 16, device: str = DEVICE) -> Iterator[tuple[socket.socket, rendezvous.Address]]:
    with socket.socket(socket.AF_UNIX) as listener:
        address = bind(listener, device, backlog)
        try:
            yield listener, address
        finally:
            with suppress(OSError):
                address.release()


def reachable(owner: int | None = None, device: str = DEVICE) -> bool:
    for address in find(os.geteuid() if owner is None else owner, device):
        with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
            connection.connect(address)
            return True
    return False


def mount(owner: int | None = None) -> Mount:
    options = f"rw,user_id={os.geteuid() if owner is None else owner}"
    return Mount(1, 0, DEVICE, "/", "/mnt", "fuse.qedfuse", "x", options)


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to be somebody else")


def test_it_is_the_owners_alone(places: Path) -> None:
    need_root()
    with listening() as (_listener, address):
        assert address.path == str(places / "run/qedfuse" / file_name(DEVICE))
        assert stat.S_IMODE(os.stat(address.path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(places / "run/qedfuse").st_mode) == 0o700
        assert reachable()
        assert not reachable(NOBODY)
    assert not os.path.exists(address.path)


def test_without_run_it_is_in_tmp(places: Path) -> None:
    (places / "run").rmdir()
    with listening() as (_listener, address):
        assert address.path == str(places / f"tmp/qedfuse-{os.geteuid()}" / file_name(DEVICE))
        assert reachable()


def test_the_directory_of_ones_session(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = places / "session"
    session.mkdir()
    (places / "run").rmdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(session))
    with listening() as (_listener, address):
        assert address.path == str(session / "qedfuse" / file_name(DEVICE))
        assert reachable()
    if os.geteuid() == 0:
        os.chown(session, NOBODY, NOBODY)
        with listening() as (_listener, address):
            assert Path(address.path).parent.parent == places / "tmp"


def test_a_stranger_cannot_take_the_place_in_tmp(places: Path) -> None:
    need_root()
    (places / "run").rmdir()
    taken = places / "tmp/qedfuse-0"
    taken.mkdir()
    os.chown(taken, NOBODY, NOBODY)
    (places / "tmp/qedfuse-0-link").symlink_to(taken)
    with listening() as (_listener, address):
        assert Path(address.path).parent not in (taken, places / "tmp/qedfuse-0-link")
        assert reachable()
        first = Path(address.path).parent
    with listening() as (_listener, address):
        assert Path(address.path).parent == first  # it is used again


def test_without_a_place_there_is_a_reason(places: Path) -> None:
    (places / "run").rmdir()
    (places / "tmp").chmod(0o777)  # others could rename what is ours
    with socket.socket(socket.AF_UNIX) as listener, pytest.raises(OSError, match="others can rename"):
        bind(listener, DEVICE, 1)


def test_what_a_killed_daemon_has_left_goes(places: Path) -> None:
    listeners = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    left = [bind(listener, f"9:{number}", 1).path for number, listener in enumerate(listeners)]
    for listener in listeners:
        listener.close()
    assert all(map(os.path.exists, left))
    with listening(device="9:1"), listening(device="9:9"):
        assert not os.path.exists(left[0])
        assert os.path.exists(left[1])
        assert reachable(device="9:1")
        assert reachable(device="9:9")
        assert not reachable(device="9:2")


def test_a_predecessor_does_not_take_the_name_away(places: Path) -> None:
    with listening() as (_first, before), listening():
        before.release()
        assert reachable()


def test_a_client_waits_its_turn(places: Path) -> None:
    with listening(backlog=0) as (listener, address), ExitStack() as crowd:
        for _ in range(4):
            connection = crowd.enter_context(socket.socket(socket.AF_UNIX))
            connection.setblocking(False)
            with suppress(BlockingIOError):
                connection.connect(address.path)

        def accept() -> None:
            for _ in range(2):
                listener.accept()[0].close()

        timer = threading.Timer(0.3, accept)
        timer.start()
        Client(mount()).close()
        timer.join()


def test_a_stranger_with_the_abstract_name_is_in_nobodys_way(places: Path) -> None:
    need_root()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server = ControlServer({"status": status})
            await server.listen(DEVICE)
            nursery.start_soon(server.serve)
            assert await trio.to_thread.run_sync(ask) == {"pid": 42}
            server.stop_listening()

    async def status(_call: Call) -> dict[str, Any]:
        return {"pid": 42}

    def ask() -> dict[str, Any]:
        with Client(mount()) as client:
            return client.ask("status")

    with squatted(DEVICE):
        with pytest.raises(QedfuseError, match=r"does not answer|somebody else"):
            Client(mount())
        trio.run(main)


# -- real mounts ------------------------------------------------------------------------------------------------------

_SQUAT = """
import os, socket, sys
os.setuid(65534)
s = socket.socket(socket.AF_UNIX)
s.bind(bytes.fromhex(sys.argv[1]))
s.listen(0)
crowd = [socket.socket(socket.AF_UNIX) for _ in range(4)]
for c in crowd:
    c.setblocking(False)
    try:
        c.connect(bytes.fromhex(sys.argv[1]))
    except BlockingIOError:
        pass
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Path, Path]:
    image, raw = tmp_path / "disk.qed", tmp_path / "disk.raw"
    qemu_img("create", "-q", "-f", "qed", image, "1M")
    raw.touch()
    return image, raw


@contextmanager
def squatted(device: str) -> Iterator[None]:
    """A stranger has the abstract name for a mount."""
    command = [sys.executable, "-c", _SQUAT, abstract_name(device).hex()]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.stdin.close()
            process.wait(20)


def test_from_another_network_namespace(disk: tuple[Path, Path]) -> None:
    need_root()
    words = ("unshare", "--net")
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace can be made here")
    image, raw = disk
    with mounted(image, raw):
        assert qedfuse("status", raw, wrapper=words).code == 0
        assert qedfuse("umount", raw, wrapper=words) == Result(0, "", "")


def test_from_a_mount_namespace_with_another_run_and_tmp(disk: tuple[Path, Path]) -> None:
    need_root()
    image, raw = disk
    words = (*new_namespace(), "sh", "-c", 'mount -t tmpfs t /run && exec "$@"', "sh")
    with mounted(image, raw):
        assert qedfuse("status", raw, wrapper=words).code == 0


def test_a_killed_daemons_socket_is_no_daemon(disk: tuple[Path, Path]) -> None:
    image, raw = disk
    with mounted(image, raw):
        found = mount_at(raw)
        assert found is not None
        pid = find_daemon(raw)
        kill(pid, 9)  # type: ignore[arg-type]
        wait_for_exit(pid)
        with pytest.raises(QedfuseError, match="does not answer"):
            Client(found)
        subprocess.run(["umount", "-l", str(raw)], check=True)
    with mounted(image, raw):
        assert qedfuse("status", raw).code == 0
