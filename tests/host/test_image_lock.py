"""Locks against the real QEMU: it and qedfuse exclude each other exactly as two QEMUs do."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qedfuse.errors import InUseError
from qedfuse.host.image_lock import add_writers_locks, drop_writers_locks, lock, share_writers_locks
from tests.helpers.qemu.locks import TO_READ, TO_WRITE, lock_bytes, qemu_holding


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = str(tmp_path / "disk.qed")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qed", path, "1M"], check=True)
    return path


@contextmanager
def opened(path: str, *, writable: bool) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def locked(path: str, *, writable: bool) -> Iterator[int]:
    with opened(path, writable=writable) as fd:
        lock(fd, path, writable=writable)
        yield fd


def qemu(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("tool", ["qemu-nbd", "qemu-storage-daemon"])
@pytest.mark.parametrize("writable", [False, True])
def test_locks_the_bytes_that_qemu_locks(image: str, tool: str, writable: bool) -> None:
    with qemu_holding(tool, image, writable=writable) as pid:
        qemus = lock_bytes(pid, image)
    with locked(image, writable=writable) as fd:
        ours = lock_bytes("self", image, fd)
    assert ours == qemus == (TO_WRITE if writable else TO_READ)


@pytest.mark.parametrize("tool", ["qemu-nbd", "qemu-storage-daemon"])
@pytest.mark.parametrize("writable", [False, True])
def test_refused_while_qemu_writes(image: str, tool: str, writable: bool) -> None:
    with qemu_holding(tool, image, writable=True) as pid, opened(image, writable=writable) as fd:
        with pytest.raises(InUseError) as caught:
            lock(fd, image, writable=writable)
        assert lock_bytes("self", image, fd) == set()
        name = tool[:15]  # all that the kernel keeps
        what = "lets nobody write to it" if writable else "may write to it"
        message = f"{image}: is in use by another process ({name}, pid {pid}), which {what}; close it there first"
        assert str(caught.value) == message
        assert caught.value.errno == errno.EBUSY
    with locked(image, writable=writable):
        pass


@pytest.mark.parametrize("tool", ["qemu-nbd", "qemu-storage-daemon"])
def test_shared_with_a_qemu_that_reads(image: str, tool: str) -> None:
    with qemu_holding(tool, image, writable=False):
        with locked(image, writable=False) as fd:
            assert lock_bytes("self", image, fd) == TO_READ
        with opened(image, writable=True) as fd, pytest.raises(InUseError, match="lets nobody write"):
            lock(fd, image, writable=True)


def test_a_raw_backing_file_that_qemu_writes(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1 << 20))
    with (
        qemu_holding("qemu-nbd", str(raw), writable=True, format="raw"),
        opened(str(raw), writable=False) as fd,
        pytest.raises(InUseError, match="may write to it"),
    ):
        lock(fd, str(raw), writable=False)


def test_qemu_refuses_what_we_write(image: str) -> None:
    before = Path(image).read_bytes()
    with locked(image, writable=True):
        for command in (
            ["qemu-img", "info", image],
            ["qemu-img", "check", image],
            ["qemu-io", "-r", "-c", "read 0 512", image],
            ["qemu-io", "-c", "write 0 512", image],
        ):
            result = qemu(*command)
            assert result.returncode != 0, command
            assert '"write" lock' in result.stderr, command
        for command in (
            ["qemu-img", "info", "-U", image],
            ["qemu-img", "check", "-U", image],
            ["qemu-io", "-U", "-r", "-c", "read 0 512", image],
        ):
            assert qemu(*command).returncode == 0, command
    assert Path(image).read_bytes() == before
    assert qemu("qemu-io", "-c", "write 0 512", image).returncode == 0


def test_qemu_reads_but_does_not_write_what_we_read(image: str) -> None:
    before = Path(image).read_bytes()
    with locked(image, writable=False):
        assert qemu("qemu-img", "info", image).returncode == 0
        assert qemu("qemu-io", "-r", "-c", "read 0 512", image).returncode == 0
        result = qemu("qemu-io", "-c", "write 0 512", image)
        assert result.returncode != 0
        assert 'Failed to get "write" lock' in result.stderr
    assert Path(image).read_bytes() == before


def test_excludes_another_descriptor_of_this_process(image: str) -> None:
    with locked(image, writable=True), opened(image, writable=True) as second:
        with pytest.raises(InUseError, match=rf"is in use by this process \(pid {os.getpid()}\)"):
            lock(second, image, writable=True)
        assert lock_bytes("self", image, second) == set()


@pytest.mark.parametrize("tool", ["qemu-nbd", "qemu-storage-daemon"])
def test_a_reader_becomes_a_writer_only_alone(image: str, tool: str) -> None:
    with locked(image, writable=False) as fd:
        with qemu_holding(tool, image, writable=False) as pid:
            with pytest.raises(
                InUseError, match=rf"another process \({tool[:15]}, pid {pid}\), which lets nobody write"
            ):
                add_writers_locks(fd, image)
            assert lock_bytes("self", image, fd) == TO_READ
        add_writers_locks(fd, image)
        with opened(image, writable=True) as second:
            share_writers_locks(second)
            assert lock_bytes("self", image, fd) == lock_bytes("self", image, second) == TO_WRITE
            assert qemu("qemu-io", "-r", "-c", "read 0 512", image).returncode != 0
        drop_writers_locks(fd)
        assert lock_bytes("self", image, fd) == TO_READ
        assert qemu("qemu-io", "-r", "-c", "read 0 512", image).returncode == 0


def test_no_writer_gets_in_between(image: str) -> None:
    """Another one tries as fast as it can while a reader becomes a writer and a reader again."""
    program = (
        "import os, sys, time; from qedfuse.errors import InUseError; from qedfuse.host.image_lock import lock\n"
        "path = sys.argv[1]; tries = 0; print(flush=True); end = time.monotonic() + 1.5\n"
        "while time.monotonic() < end:\n"
        "    fd = os.open(path, os.O_RDWR); tries += 1\n"
        "    try: lock(fd, path, writable=True)\n"
        "    except InUseError: os.close(fd)\n"
        "    else: sys.exit('locked')\n"
        "print(tries)"
    )
    with locked(image, writable=False) as fd:
        with subprocess.Popen([sys.executable, "-c", program, image], stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "\n"
            upgrades = 0
            while other.poll() is None:
                with opened(image, writable=True) as second:
                    try:
                        add_writers_locks(fd, image)
                    except InUseError:  # the other one was trying
                        continue
                    share_writers_locks(second)
                    upgrades += 1
                drop_writers_locks(fd)
            tries = int(other.stdout.read())
        assert other.returncode == 0
        assert tries > 10 and upgrades > 10
        assert lock_bytes("self", image, fd) == TO_READ


def test_a_killed_holder_leaves_no_lock(image: str) -> None:
    program = (
        "import os, sys; from qedfuse.host.image_lock import lock; path = sys.argv[1];"
        "lock(os.open(path, os.O_RDWR), path, writable=True); print(flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "\n"
            with opened(image, writable=True) as fd, pytest.raises(InUseError, match=f"pid {holder.pid}"):
                lock(fd, image, writable=True)
        finally:
            holder.kill()
    with locked(image, writable=True):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_holder_that_we_may_not_look_into(image: str) -> None:
    program = (
        "import os, sys\n"
        "from qedfuse.errors import InUseError\n"
        "from qedfuse.host.image_lock import lock\n"
        "path = sys.argv[1]\n"
        "fd = os.open(path, os.O_RDWR); os.setuid(65534)\n"
        "try: lock(fd, path, writable=True)\n"
        "except InUseError as error: sys.exit(str(error))"
    )
    with locked(image, writable=True):
        result = qemu(sys.executable, "-c", program, image)
    assert f"{image}: is in use by another process (of unknown pid), which lets nobody write" in result.stderr


def test_an_exclusive_lock_of_something_else(image: str) -> None:
    with opened(image, writable=True) as other, opened(image, writable=False) as fd:
        fcntl.lockf(other, fcntl.LOCK_EX)  # what a backup tool might take, on the whole file
        with pytest.raises(InUseError, match="is in use by"):
            lock(fd, image, writable=False)
        fcntl.lockf(other, fcntl.LOCK_UN)
        lock(fd, image, writable=False)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    image: str, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without_locks(fd: int, command: int, argument: bytes) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "fcntl", without_locks)
    with caplog.at_level(logging.WARNING, "qedfuse"), opened(image, writable=True) as fd:
        lock(fd, image, writable=False)
        assert caplog.messages == []
        lock(fd, image, writable=True)
        assert [image in message for message in caplog.messages] == [True]


def test_a_failing_file_system(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, command: int, argument: bytes) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "fcntl", failing)
    with opened(image, writable=True) as fd, pytest.raises(OSError, match="Input/output error"):
        lock(fd, image, writable=True)
