"""Real mounts, which never outlive their test.

    with mounted(image, raw):                      # in the background, as users do
    with mounted(image, raw, "--ro") as mount:     # more words for the command line
        mount.umount()                             # ends it early; a mount that is gone is not unmounted again

`QEDFUSE_TEST_OPTIONS` in the environment adds words to every mount, for instance `--no-fastpath`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qedfuse.host.mountinfo import FSTYPE, Mount, find_mount
from tests.helpers.qemu.cli import TIMEOUT, Name, Result, environment, qedfuse

EXTRA_OPTIONS = os.environ.get("QEDFUSE_TEST_OPTIONS", "").split()

QEMU_IMG = shutil.which("qemu-img")

_MNT_FORCE = 1
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8


class Mounted(NamedTuple):
    """A mount that `mounted` has made. `process`: the daemon, if it is in the foreground; `log`: its log file."""

    point: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def umount(self) -> Result:
        """`qedfuse umount`."""
        return qedfuse("umount", self.point)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def pid(self) -> int:
        """The daemon's process id."""
        return self.process.pid if self.process else find_daemon(self.point)


def mountpoint(directory: Path, *, over_file: bool) -> tuple[Path, Path]:
    """A new file or directory to mount `disk.qed` over, and where the raw file is then."""
    point = directory / "point"
    if over_file:
        point.touch()
        return point, point
    point.mkdir()
    return point, point / "disk.raw"


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A descriptor of the file."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def need_fuse() -> None:
    """Skip, with the reason, where nothing can be mounted."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse here")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse may not be opened")
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed")


def new_namespace() -> tuple[str, ...]:
    """The words that run a command in a mount namespace of its own, with mounts that are nobody else's. Skips where
    there is none: for an ordinary user, and in a chroot, whose root is no mount."""
    words = ("unshare", "--mount", "--propagation", "private")
    done = subprocess.run([*words, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount namespace of its own: {done.stderr.strip()}")
    return words


@contextmanager
def mounted(*words: Name, foreground: bool = False, module: str = "qedfuse") -> Iterator[Mounted]:
    """`qedfuse mount WORDS...`, unmounted in the end. Options may stand anywhere. `module`: what is run instead, in the
    foreground."""
    need_fuse()
    point = Path(_positional(words)[-1])
    log = point.parent / f"{point.name}.log"
    arguments = ["mount", *EXTRA_OPTIONS, "--log-file", str(log), *map(str, words)]
    if foreground:
        with _foreground(module, arguments, point, log) as mount:
            yield mount
        return
    with cleaned_up(point):
        done = qedfuse(*arguments)
        assert done == Result(0, "", ""), done
        yield Mounted(point, log)
        result = qedfuse("umount", point) if is_mounted(point) else Result(0, "", "")
        assert result == Result(0, "", ""), (result, log.read_text())


def _positional(words: tuple[Name, ...]) -> list[str]:
    """The words that are no options."""
    result = []
    rest = iter(map(str, words))
    for word in rest:
        if word in ("-o", "--log-file", "--backing-root"):
            next(rest)
        elif not word.startswith("-"):
            result.append(word)
    return result


@contextmanager
def _foreground(module: str, arguments: list[str], point: Path, log: Path) -> Iterator[Mounted]:
    command = [sys.executable, "-m", module, arguments[0], "-f", *arguments[1:]]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as process:
        try:
            with cleaned_up(point):
                wait_until(
                    lambda: process.poll() is not None or "mounted on" in (log.read_text() if log.exists() else "")
                )
                assert process.poll() is None, log.read_text()
                yield Mounted(point, log, process)
                if is_mounted(point):
                    assert qedfuse("umount", point) == Result(0, "", "")
                process.wait(TIMEOUT)
        finally:
            process.kill()


@contextmanager
def cleaned_up(point: Path) -> Iterator[None]:
    """Nothing stays mounted at `point`, whatever happens in the block, and after a failure no daemon: it might wait for
    ever, for space to write what it has or for a user of the mount."""
    try:
        yield
    except BaseException:
        kill_daemons(point)
        raise
    finally:
        while find_mount(_unasked(point)) is not None or find_mount(os.path.realpath(point)) is not None:
            subprocess.run(["umount", "-l", str(point)], check=True, timeout=TIMEOUT)


def kill_daemons(point: Path) -> None:
    """Kill the processes that were started to show something at `point`: by their command lines, whether it is still
    mounted or not, and without a word to them. Whoever waits for them gets an error."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if b"mount" in words and os.fsencode(point) in words:
                os.kill(int(entry.parent.name), signal.SIGKILL)


def _unasked(point: Path) -> str:
    """The real path, found without a look at what is mounted there."""
    return os.path.join(os.path.realpath(point.parent), point.name)


def abort(point: Path) -> None:
    """End what is mounted at `point`, and with errors all who wait for it. Asks the mount nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    while (mount := find_mount(_unasked(point))) is not None:
        if os.geteuid() == 0:
            for flags in (_MNT_FORCE, _MNT_DETACH):
                if libc.umount2(os.fsencode(point), flags | _UMOUNT_NOFOLLOW) and ctypes.get_errno() == errno.EPERM:
                    raise PermissionError(errno.EPERM, "cannot be unmounted", str(point))
        else:
            switch = Path("/sys/fs/fuse/connections", mount.device.partition(":")[2], "abort")
            if switch.exists():
                switch.write_text("1")
            subprocess.run(["fusermount3", "-u", "-z", str(point)], check=True, timeout=TIMEOUT)


@contextmanager
def aborted(*points: Path) -> Iterator[None]:
    """However the block ends, nothing is mounted at `points` then, and no process waits for it."""
    try:
        yield
    finally:
        for point in points:
            abort(point)


def is_mounted(point: Path) -> bool:
    return mount_at(point) is not None


def mount_at(point: Path) -> Mount | None:
    """The qedfuse mount on `point`; asks the kernel's table, not the mount."""
    mount = find_mount(os.path.realpath(point))
    return mount if mount is not None and mount.fstype == FSTYPE else None


def status(point: Path) -> dict[str, Any]:
    """What the daemon that serves `point` says of itself."""
    from qedfuse.daemon.control import Client

    mount = mount_at(point)
    assert mount is not None
    with Client(mount) as client:
        return client.ask("status")


def until_closed(point: Path) -> None:
    """Until the daemon has closed the images of a source directory that nobody uses."""

    def closed() -> bool:
        found = status(point)
        return not found["images"] and not found["pending-images"]

    wait_until(closed)


def counters(point: Path) -> dict[str, int]:
    """What the fast path has done so far; see `FastPath.counters`."""
    found = status(point)["fastpath-counters"]
    assert isinstance(found, dict)
    return found


def find_daemon(point: Path) -> int:
    """The pid of the daemon that serves `point`, by its control socket's answer."""
    return int(status(point)["pid"])


def wait_until(condition: object, seconds: float = 20) -> None:
    """Poll for something that has no event to wait for."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not happened in time"
        time.sleep(0.01)


def wait_for_exit(pid: int, seconds: float = 20) -> None:
    """Until a process that is not our child has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        import select

        assert select.select([fd], [], [], seconds)[0], f"process {pid} does not end"
    finally:
        os.close(fd)


def kill(pid: int, number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(pid, number)
