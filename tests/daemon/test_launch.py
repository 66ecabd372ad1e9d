"""The surroundings in which a daemon is started: no room for temporary files, descriptors of the caller, limits."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from qedfuse.daemon.launch import inherited_descriptors
from qedfuse.host import limits
from tests.helpers.mounts.mounts import (
    EXTRA_OPTIONS,
    cleaned_up,
    find_daemon,
    is_mounted,
    mounted,
    mountpoint,
    need_fuse,
    new_namespace,
    wait_for_exit,
    wait_until,
)
from tests.helpers.qemu.cli import Result, environment, one_line, qedfuse, qemu_img, qemu_io

MIB = 1 << 20
INFINITY = resource.RLIM_INFINITY


@pytest.fixture
def image(tmp_path: Path) -> Path:
    need_fuse()
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", path, "64M")
    qemu_io(path, "write -P 65 0 64k")
    return path


@contextmanager
def started(
    image: str | Path, raw: Path, preexec: Callable[[], None] | None = None, pass_fds: tuple[int, ...] = ()
) -> Iterator[Path]:
    """A mount whose daemon is started with `preexec` called and descriptors passed on. Yields its log."""
    log = raw.parent / "log"
    command = [sys.executable, "-m", "qedfuse", "mount", *EXTRA_OPTIONS, "--log-file", str(log), str(image), str(raw)]
    with cleaned_up(raw):
        done = subprocess.run(
            command,
            env=environment(),
            capture_output=True,
            text=True,
            preexec_fn=preexec,
            pass_fds=pass_fds,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        yield log
        assert qedfuse("umount", raw) == Result(0, "", "")


# -- temporary files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--ro"]], ids=["rw", "ro"])
def test_no_temporary_file_is_needed(tmp_path: Path, image: Path, raw: Path, options: list[str]) -> None:
    """Everything is read-only but for the image."""
    script = (
        'mount --bind "$1" /mnt && mount -o remount,ro,bind / || exit 77; '
        "for each in /tmp /var/tmp; do mount -t tmpfs -o ro none $each || exit 77; done; "
        "[ ! -w /dev/shm ] || mount -t tmpfs -o ro none /dev/shm || exit 77; cd /; shift; "
        '"$@" mount --log-file /dev/null $OPTIONS /mnt/disk.qed /mnt/disk.raw && { head -c 3 /mnt/disk.raw; '
        '"$@" umount /mnt/disk.raw; }'
    )
    words = [*new_namespace(), "sh", "-c", script, "sh", str(tmp_path), sys.executable, "-m", "qedfuse"]
    env = environment({"OPTIONS": " ".join([*EXTRA_OPTIONS, *options]), "TMPDIR": "/nowhere"})
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip(f"nothing can be made read-only here: {done.stderr.strip()}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "AAA", "")


def test_libfuse_says_why_where_no_file_may_be_written(image: Path, raw: Path) -> None:
    wrapper = (*new_namespace(), "sh", "-c", 'mount --bind /dev/null /dev/fuse && ulimit -f 0 && exec "$@"', "sh")
    one_line(qedfuse("mount", image, raw, wrapper=wrapper), 1, str(raw), "cannot mount", "fuse")


# -- descriptors ------------------------------------------------------------------------------------------------------


def open_files(pid: int) -> list[str]:
    names = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            names.append(os.readlink(entry))
    return names


@pytest.mark.parametrize("limit", [None, 1 << 20])
def test_the_callers_descriptors_are_closed(image: Path, raw: Path, tmp_path: Path, limit: int | None) -> None:
    """A lock that it holds is free, and what it reads ends, when it lets go of them."""

    def raise_limit() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if limit is not None and hard >= limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

    reader, writer = os.pipe()
    with open(tmp_path / "lock", "w") as lock, open(tmp_path / "many", "w") as many:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copies = [os.dup(many.fileno()) for _ in range(20)]
        with started(image, raw, raise_limit, (writer, lock.fileno(), *copies)) as log:
            for fd in (writer, *copies):
                os.close(fd)
            os.set_blocking(reader, False)
            assert os.read(reader, 1) == b""
            lock.close()
            with open(tmp_path / "lock") as again:
                fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            names = open_files(find_daemon(raw))
            assert str(tmp_path / "many") not in names
            assert {str(image), str(log), "/dev/fuse"} <= set(names)
            assert [name for name in names if "pipe:" in name and f"[{os.fstat(reader).st_ino}]" in name] == []
    os.close(reader)


def test_a_caller_who_has_closed_all_of_its_own(image: Path, raw: Path) -> None:
    with started(image, raw, lambda: os.closerange(0, 3)):
        assert raw.read_bytes()[:3] == b"AAA"


def test_an_image_may_be_one_of_them(image: Path, raw: Path) -> None:
    with open(image, "r+b") as file, started(f"/dev/fd/{file.fileno()}", raw, pass_fds=(file.fileno(),)):
        assert raw.read_bytes()[:3] == b"AAA"


def test_which_descriptors_are_closed() -> None:
    with open("/dev/null") as one, open("/dev/null") as two, open("/dev/null") as three:
        numbers = [file.fileno() for file in (one, two, three)]
        paths = [f"/dev/fd/{numbers[0]}", f"/proc/self/fd/{numbers[1]}", f"/tmp/dev/fd/{numbers[2]}", "/dev/fd/x"]
        found = inherited_descriptors(paths)
        assert numbers[2] in found
        assert not {0, 1, 2, *numbers[:2]} & set(found)
        for fd in found:
            os.fstat(fd)


def test_in_the_foreground_they_stay(image: Path, raw: Path, tmp_path: Path) -> None:
    """Those are for the daemon: whatever runs it may have its reasons."""
    command = [sys.executable, "-m", "qedfuse", "mount", "-f", *EXTRA_OPTIONS, str(image), str(raw)]
    with (
        open(tmp_path / "mine", "w") as mine,
        subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, pass_fds=(mine.fileno(),)) as process,
        cleaned_up(raw),
    ):
        assert process.stderr is not None
        assert b"mounted on" in process.stderr.readline()
        assert str(tmp_path / "mine") in open_files(process.pid)
        assert qedfuse("umount", raw) == Result(0, "", "")
        assert process.wait(20) == 0


# -- the session ------------------------------------------------------------------------------------------------------


def test_the_daemon_has_a_session_of_its_own(image: Path, raw: Path) -> None:
    with mounted(image, raw) as mount:
        pid = mount.pid()
        assert os.getsid(pid) == os.getpgid(pid) == pid
        assert os.readlink(f"/proc/{pid}/cwd") == "/"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_terminals_signal_ends_a_start_and_leaves_nothing(image: Path, raw: Path, number: signal.Signals) -> None:
    """It goes to the process group: to the daemon as well as to the process that waits for it, at whatever point."""
    log = raw.parent / "log"
    command = [sys.executable, "-m", "qedfuse", "mount", *EXTRA_OPTIONS, "--log-file", str(log), str(image), str(raw)]
    with ExitStack() as stack:
        stack.enter_context(cleaned_up(raw))
        for name in (signal.SIGHUP, signal.SIGINT):
            stack.callback(signal.signal, name, signal.signal(name, signal.SIG_DFL))
        for delay in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7):
            with subprocess.Popen(
                command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
            ) as process:
                time.sleep(delay)
                if process.poll() is None:
                    os.killpg(process.pid, number)
                _out, err = process.communicate(timeout=30)
            assert "bug" not in err and "bug" not in (log.read_text() if log.exists() else "")
            if process.returncode == 0:
                assert qedfuse("umount", raw).code == 0
                continue
            wait_until(lambda group=process.pid: group_is_gone(group))
            if is_mounted(raw):  # the daemon had left the group, and nobody was told any more
                pid = find_daemon(raw)
                assert qedfuse("umount", raw).code == 0
                wait_for_exit(pid)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


# -- limits -----------------------------------------------------------------------------------------------------------


def limit(which: int, soft: int, hard: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(which, (soft, hard))


def test_a_soft_limit_of_file_size_is_raised(image: Path, raw: Path) -> None:
    """The disk is larger than that, and its image may become so."""
    with started(image, raw, limit(resource.RLIMIT_FSIZE, 4096, INFINITY)):
        assert raw.stat().st_size == 64 * MIB
        with raw.open("r+b") as file:
            file.seek(40 * MIB)
            file.write(b"x" * MIB)
            file.flush()
            os.fsync(file.fileno())
    qemu_io(image, f"read -P {ord('x')} 40M 1M")


@pytest.mark.parametrize("over_file", [True, False], ids=["file", "directory"])
def test_a_hard_limit_of_file_size_leaves_what_is_below(image: Path, tmp_path: Path, over_file: bool) -> None:
    point, raw = mountpoint(tmp_path, over_file=over_file)
    size = image.stat().st_size
    with started(image, point, limit(resource.RLIMIT_FSIZE, size, size)) as log:
        assert f"beyond {size} bytes here (ulimit -Hf)" in log.read_text()
        assert raw.stat().st_size == 64 * MIB
        with raw.open("r+b", buffering=0) as file:
            assert file.read(3) == b"AAA"
            os.pwrite(file.fileno(), b"B" * 4096, 0)
            os.fsync(file.fileno())
            os.pwrite(file.fileno(), b"x" * MIB, 40 * MIB)
            with pytest.raises(OSError) as raised:
                os.fsync(file.fileno())
            assert raised.value.errno == errno.EFBIG
            os.pwrite(file.fileno(), b"C" * 4096, 4096)
            os.fsync(file.fileno())
    qemu_img("check", image)
    qemu_io(image, "read -P 66 0 4k", "read -P 67 4k 4k")


@pytest.mark.parametrize("kib", [1_000_000, 300_000])
def test_a_limit_of_address_space(image: Path, raw: Path, kib: int) -> None:
    size = kib << 10
    with started(image, raw, limit(resource.RLIMIT_AS, size, size)) as log:
        with raw.open("r+b") as file:
            file.write(os.urandom(40 * MIB))
            file.flush()
            os.fsync(file.fileno())
        assert len(raw.read_bytes()) == 64 * MIB
        assert "Traceback" not in log.read_text()
    qemu_img("check", image)


def test_too_little_address_space_is_named(image: Path, raw: Path) -> None:
    """Enough for Python, but not for all that is loaded and reserved. However far it comes, nothing stays mounted."""
    for kib in (60_000, 70_000, 80_000, 90_000):
        size = kib << 10
        with cleaned_up(raw):
            result = qedfuse("mount", image, raw, preexec=limit(resource.RLIMIT_AS, size, size))
            if result.code == 0:
                qedfuse("umount", raw)  # it may have ended since: its first request takes more memory
            elif (
                "Traceback" not in result.err and "error while loading" not in result.err
            ):  # Python's, the linker's end
                one_line(result, 1)
                assert "bug" not in result.err
            assert not is_mounted(raw)


def test_address_space_is_reserved_as_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    have = 1 << 40
    bound = INFINITY

    def fake(fd: int, size: int, *, flags: int) -> int:
        if size > have:
            raise OSError(errno.ENOMEM, "")
        return size

    monkeypatch.setattr(mmap, "mmap", fake)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (bound, bound))
    reserve: Callable[[int, int], object] = limits.reserve
    assert reserve(1 << 30, 1 << 25) == 1 << 30
    have = 1 << 28
    assert reserve(1 << 30, 1 << 25) == 1 << 28
    have, bound = 1 << 40, 1_000_000 << 10
    assert reserve(1 << 30, 1 << 25) == 1 << 27
    bound = 1 << 20
    assert reserve(1 << 30, 1 << 25) == 1 << 25
    have = 1 << 24
    with pytest.raises(MemoryError):
        reserve(1 << 30, 1 << 25)


def test_shortages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 1 << 20
    monkeypatch.setattr(resource, "getrlimit", lambda which: (bound, bound))
    named = {
        MemoryError(): "out of memory",
        OSError(errno.ENOMEM, ""): "out of memory",
        ImportError("x.so: failed to map segment from shared object"): "out of memory",
        RuntimeError("can't start new thread"): "cannot start a thread",
        OSError(errno.EAGAIN, ""): "cannot start a thread",
    }
    for error, line in named.items():
        bound = 1 << 20
        assert limits.explain_shortage(error) == f"{line}: address space is limited to 1024 KiB (ulimit -v)"
        bound = INFINITY
        assert limits.explain_shortage(error) == line
    for other in (
        OSError(errno.EIO, ""),
        OSError(errno.EAGAIN, "", "file"),
        ImportError("no module"),
        RuntimeError("bug"),
        KeyboardInterrupt(),
    ):
        assert limits.explain_shortage(other) is None
