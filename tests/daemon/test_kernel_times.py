"""The time of change of a file mount, set from outside: by nothing that stays, gets stuck, or is missed when killed."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from qedfuse.daemon import kernel_times
from qedfuse.daemon.kernel_times import Clock, Clocks, Target
from qedfuse.native import _sidecar
from tests.helpers.mounts.mounts import find_daemon, mounted, mountpoint, need_fuse, opened, wait_for_exit, wait_until
from tests.helpers.mounts.slots import slot_of
from tests.helpers.qemu.cli import environment, qemu_img

MIB = 1 << 20


def children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:  # the thread has ended
            continue
    return found


# -- the call ---------------------------------------------------------------------------------------------------------


def set_time(file: Path, mtime_ns: int, *, device: int = 0, inode: int = 0) -> int:
    """`device`, `inode`: more than the file's."""
    status = file.lstat()
    place = os.fsencode(file), status.st_dev + device, status.st_ino + inode
    return _sidecar.set_time(*place, *divmod(mtime_ns, 1_000_000_000))


def test_the_time_is_set_and_the_size_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 12345)
    beyond = 9_300_000_000_000_000_000  # what 64 bits hold no longer
    for mtime in (2_999_999_999, 0, -1_500_000_000, beyond):
        os.utime(file, ns=(7, -2_000_000_000))
        assert set_time(file, mtime) == 12345
        status = file.stat()
        assert (status.st_atime_ns, status.st_mtime_ns) == (7, mtime)


def test_what_the_kernel_has_given_stands(tmp_path: Path) -> None:
    """It is no later than the clock, and later than what it would be told."""
    file = tmp_path / "file"
    file.touch()
    now = time.time_ns()
    for before, told, after in ((now, now - 1, now), (now - 1, now, now), (now + 10**12, now, now)):
        os.utime(file, ns=(0, before))
        set_time(file, told)
        assert file.stat().st_mtime_ns == after


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    """Not what is at the path of a mount that is gone, or of a file that was renamed, and nothing that a link there
    leads to."""
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(file)
    os.utime(file, ns=(0, 0))
    for place, code in (((1, 0), errno.ENODEV), ((0, 1), errno.ESTALE)):
        with pytest.raises(OSError) as raised:
            set_time(file, 5, device=place[0], inode=place[1])
        assert raised.value.errno == code
    for path in (tmp_path / "no", Path("/proc/self/no/x")):
        with pytest.raises(FileNotFoundError):
            _sidecar.set_time(os.fsencode(path), 0, 0, 5, 5)
    set_time(link, 5)
    assert file.stat().st_mtime_ns == 0
    with pytest.raises(ValueError, match="null"):
        _sidecar.set_time(b"a\0b", 0, 0, 5, 5)


def test_the_process_keeps_descriptors_and_signals(tmp_path: Path) -> None:
    file = tmp_path / "file"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # there is nothing to wait for then
    try:
        with file.open("w") as opened:
            set_time(file, 5)
            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {*mask, signal.SIGUSR1}
            opened.write("x")
        assert file.read_text() == "x"
    finally:
        signal.signal(signal.SIGCHLD, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# -- the clock --------------------------------------------------------------------------------------------------------


class _Image:
    """As much of an image as a clock looks at."""

    path = "disk.qed"
    size = 0
    writable = True

    def __init__(self) -> None:
        self.storage = self

    async def clean(self) -> None:
        """It is."""

    def stat(self) -> os.stat_result:
        return os.stat_result((0,) * 19)


def target_of(image: _Image) -> Target:
    return Target(b"/nowhere", 1, slot_of(image))


def test_a_slow_call_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is given up for the moment, no other one is begun, and when it has come back the next one is."""
    free = threading.Event()
    calls: list[int] = []
    fails: list[int] = []

    def set_time(*args: object) -> int:
        calls.append(1)
        if fails:
            raise OSError(fails[0], "")
        assert free.wait(20)
        return 0

    monkeypatch.setattr(_sidecar, "set_time", set_time)
    monkeypatch.setattr(kernel_times, "_PATIENCE", 0.1)
    writes = 0
    clock = Clock(0, lambda: writes)
    target = target_of(_Image())

    async def main() -> None:
        nonlocal writes
        await clock.update(target)
        assert not calls  # nothing was written
        writes = 1
        await clock.update(target)
        start = time.monotonic()
        await clock.update(target)
        assert len(calls) == 1
        assert time.monotonic() - start < 5
        free.set()
        with trio.fail_after(10):
            while len(calls) == 1:
                await trio.sleep(0.01)
                await clock.update(target)
        await clock.update(target)
        assert len(calls) == 2  # told
        writes = 2
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(clock.update, target)
        assert len(calls) == 3
        for code in (errno.ENOENT, errno.ESTALE, errno.EBADF):  # another one is at the path, or its image was closed
            fails[:] = [code]
            writes += 1
            await clock.update(target)
        assert not caplog.text
        for code, again in ((errno.ECANCELED, True), (errno.EAGAIN, True), (errno.ENODEV, False)):
            writes += 1
            fails[:] = [code]
            calls.clear()
            await clock.update(target)
            fails.clear()
            await clock.update(target)
            assert len(calls) == 1 + again
            assert caplog.text.count("cannot tell the kernel") == 1

    trio.run(main)


def test_the_wrong_size_at_the_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sidecar, "set_time", lambda *args: 7)
    with pytest.raises(OSError, match="not usable: the kernel shows 7 bytes instead of 0"):
        trio.run(Clock(0, lambda: 0).start, target_of(_Image()))


def test_an_image_can_be_replaced_while_the_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer waits for the replacement, not the other way round, and the size is asked of the new one."""
    free = threading.Event()

    def set_time(*args: object) -> int:
        assert free.wait(20)
        return 0

    monkeypatch.setattr(_sidecar, "set_time", set_time)
    slot = slot_of(_Image())

    async def main() -> None:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Clock(0, lambda: 0).start, Target(b"/nowhere", 1, slot))
                await trio.testing.wait_all_tasks_blocked()
                async with slot.quiesced():
                    free.set()
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    slot.replace(cast(Any, _Image()))
                    assert nursery.child_tasks

    trio.run(main)


class _Node:
    id = 2

    def __init__(self) -> None:
        self.direct_writers = 1
        self.mounted = SimpleNamespace(slot=slot_of(_Image()))


def test_many_looks_have_one_consequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none when nothing was written since, or the file is closed by then."""
    calls: list[object] = []

    def set_time(path: bytes, *_args: object) -> int:
        calls.append(path)
        return 0

    monkeypatch.setattr(_sidecar, "set_time", set_time)
    monkeypatch.setattr(kernel_times, "_DELAY", 0.01)
    writes = 0

    async def main() -> None:
        nonlocal writes
        node = cast(Any, _Node())
        async with trio.open_nursery() as nursery:
            clocks = Clocks(nursery, lambda _node: b"/there", 0, lambda: writes)
            for opened, written, expected in ((1, 1, 1), (1, 1, 1), (1, 2, 2), (0, 3, 2)):
                node.direct_writers, writes = opened, written
                for _ in range(100):
                    clocks.update_soon(node)
                await trio.testing.wait_all_tasks_blocked(0.2)
                assert calls == [b"/there"] * expected

    trio.run(main)


# -- the mount --------------------------------------------------------------------------------------------------------


def write_page(fd: int) -> None:
    """One that no other one is like; also by a descriptor with O_DIRECT."""
    with mmap.mmap(-1, 4096) as page:
        page[:] = os.urandom(4096)
        os.pwrite(fd, page, 0)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    need_fuse()
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", path, "64M")
    return path


@pytest.mark.parametrize("over_file", [True, False], ids=["file", "directory"])
def test_a_mount_is_one_process(image: Path, tmp_path: Path, over_file: bool) -> None:
    point, raw = mountpoint(tmp_path, over_file=over_file)
    with mounted(image, point):
        pid = find_daemon(point)
        assert raw.stat().st_size == 64 * MIB
        assert not children(pid)
        with raw.open("r+b") as file:
            file.write(b"x")
        assert raw.stat().st_mtime > time.time() - 100
        wait_until(lambda: not children(pid))


@pytest.mark.parametrize("over_file", [True, False], ids=["file", "directory"])
@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["cached", "direct"])
def test_a_time_that_a_process_sets_stays(image: Path, tmp_path: Path, over_file: bool, flags: int) -> None:
    """Also the one that the kernel was told last: a program may leave a file's time as it has found it."""
    point, raw = mountpoint(tmp_path, over_file=over_file)
    with mounted(image, point):
        for _ in range(2):
            with opened(raw, os.O_RDWR | flags) as fd:
                before = os.fstat(fd).st_mtime_ns
                time.sleep(0.02)
                write_page(fd)
                os.fsync(fd)
                if before > 10**18:
                    os.utime(fd, ns=(before, before))
        assert raw.stat().st_mtime_ns == before
    assert image.stat().st_mtime_ns == before


def test_a_time_does_not_go_back(image: Path, tmp_path: Path) -> None:
    """What was written into the cache last is later than what is in the image."""
    point, raw = mountpoint(tmp_path, over_file=False)
    with mounted(image, point), opened(raw) as cached, opened(raw, os.O_RDWR | os.O_DIRECT) as direct:
        write_page(direct)
        time.sleep(0.05)
        os.pwrite(cached, b"x", 8192)
        before = os.fstat(cached).st_mtime_ns
        end = time.monotonic() + 4 * kernel_times._DELAY
        while time.monotonic() < end:
            assert raw.stat().st_mtime_ns >= before
            time.sleep(0.01)


def test_a_file_that_was_renamed_is_found(tmp_path: Path) -> None:
    """And not the one that has its name now."""
    need_fuse()
    source, point = tmp_path / "source", tmp_path / "point"
    for path in (source, point):
        path.mkdir()
    for name in ("one.qed", "two.qed"):
        qemu_img("create", "-q", "-f", "qed", source / name, "1M")

    def write(name: str) -> int:
        with opened(point / name, os.O_RDWR | os.O_DIRECT) as fd:
            write_page(fd)
        return (point / name).stat().st_mtime_ns

    with mounted(source, point):
        before = write("one.raw")
        (source / "one.qed").rename(source / "new.qed")
        (source / "two.qed").rename(source / "one.qed")
        wait_until(lambda: sorted(os.listdir(point)) == ["new.raw", "one.raw"])
        time.sleep(1.1)  # what the kernel knows of names is too old then
        other = (point / "one.raw").stat().st_mtime_ns, (source / "one.qed").stat().st_mtime_ns
        assert write("new.raw") > before
        assert ((point / "one.raw").stat().st_mtime_ns, (source / "one.qed").stat().st_mtime_ns) == other


@pytest.mark.parametrize("over_file", [True, False], ids=["file", "directory"])
def test_times_that_64_bits_do_not_hold(image: Path, tmp_path: Path, over_file: bool) -> None:
    far = 9_300_000_000  # seconds
    try:
        os.utime(image, (2 * far, far))
    except OSError:
        pytest.skip("the file system has no such times")
    if image.stat().st_mtime != far:
        pytest.skip("the file system has no such times")
    point, raw = mountpoint(tmp_path, over_file=over_file)
    with mounted(image, point):
        assert raw.stat().st_mtime == far
        with opened(raw, os.O_RDWR | os.O_DIRECT) as fd:
            write_page(fd)
            wait_until(lambda: os.fstat(fd).st_mtime < far)
        assert time.time() - 100 < raw.stat().st_mtime <= time.time()


def test_a_mount_that_has_left_its_place_is_no_news(image: Path, tmp_path: Path) -> None:
    point, raw = mountpoint(tmp_path, over_file=False)
    with mounted(image, point) as mount:
        pid = find_daemon(point)
        with opened(raw, os.O_RDWR | os.O_DIRECT) as fd:
            subprocess.run(["umount", "-l", str(point)], check=True)
            write_page(fd)
        wait_for_exit(pid)
        assert "cannot tell" not in mount.text()


def test_killing_all_of_its_children_is_not_seen(image: Path, tmp_path: Path) -> None:
    """close(2) goes on to work, and the time of change comes with the next one."""
    raw = tmp_path / "raw"
    raw.touch()
    with mounted(image, raw) as mount:
        pid = find_daemon(raw)
        over = threading.Event()
        killed: list[int] = []

        def kill_them() -> None:
            while not over.is_set():
                for child in children(pid):
                    try:
                        os.kill(child, signal.SIGKILL)
                        killed.append(child)
                    except ProcessLookupError:
                        continue

        killer = threading.Thread(target=kill_them)
        killer.start()
        try:
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                with raw.open("r+b", buffering=0) as file:
                    file.write(b"x" * 4096)
        finally:
            over.set()
            killer.join()
        print(f"figures: {len(killed)} children killed")
        assert killed
        os.utime(image, ns=(5, 5))
        with raw.open("r+b", buffering=0) as file:
            file.write(b"y")
        assert raw.stat().st_mtime > time.time() - 100
        assert "Traceback" not in mount.text()


#: A file system whose root never gets its times set, as when the host's disk does not answer.
_STUCK = """
import os, stat, sys
import pyfuse3, trio
from qedfuse.native import _sidecar

class Operations(pyfuse3.Operations):
    async def getattr(self, inode, ctx):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode = inode, stat.S_IFREG | 0o644
        return entry

    async def setattr(self, inode, attr, fields, fh, ctx):
        print("asked", flush=True)
        await trio.sleep_forever()

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        device = await trio.to_thread.run_sync(sys.stdin.readline)
        await trio.to_thread.run_sync(_sidecar.set_time, os.fsencode(sys.argv[1]), int(device), 1, 5, 5)

pyfuse3.init(Operations(), sys.argv[1], {"fsname=stuck"})
print("mounted", flush=True)
trio.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGXCPU])
def test_a_killed_daemon_is_not_held_up_by_its_own_request(tmp_path: Path, number: signal.Signals) -> None:
    """Nor one that leaves a core file, for which the kernel first ends all threads."""
    need_fuse()
    point = tmp_path.resolve() / "point"
    point.touch()
    command: list[Any] = [sys.executable, "-c", _STUCK, point]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True
    ) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.readline() == "mounted\n"
            found = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
            major, minor = next(words[2] for words in found if words[4] == str(point)).split(":")
            print(os.makedev(int(major), int(minor)), file=process.stdin, flush=True)
            assert process.stdout.readline() == "asked\n"
            stuck = children(process.pid)
            assert len(stuck) == 1
            process.send_signal(number)
            assert process.wait(20) == -number
            wait_for_exit(stuck[0])
        finally:
            process.kill()
            subprocess.run(["umount", "-l", str(point)], check=True)
