"""Files with which the offline commands have nothing to do: one line, and the file is as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qedfuse.cli.main import main
from tests.helpers.images.conversions import MIB
from tests.helpers.images.devices import device_with
from tests.helpers.mounts.guests import filesystem, need_guest
from tests.helpers.mounts.mounts import mounted, opened
from tests.helpers.qemu.cli import Result, new_image, one_line, qemu_has_open
from tests.helpers.qemu.locks import qemu_holding

Command = Callable[[Path], tuple[str | Path, ...]]


def compact(path: Path) -> tuple[str | Path, ...]:
    return "compact", path


def dry_run(path: Path) -> tuple[str | Path, ...]:
    return "compact", "--dry-run", path


def grow(path: Path) -> tuple[str | Path, ...]:
    return "resize", path, "+1M"


def shrink(path: Path) -> tuple[str | Path, ...]:
    return "resize", "--shrink", path, "-512"


def rename(path: Path) -> tuple[str | Path, ...]:
    return "rebase", "-u", path


def stand_alone(path: Path) -> tuple[str | Path, ...]:
    return "rebase", "-b", "", path


def compare(path: Path) -> tuple[str | Path, ...]:
    return "compare", "-f", "qed", path, path


def measure(path: Path) -> tuple[str | Path, ...]:
    return "measure", "-f", "qed", "-O", "qed", path


WRITING = [compact, grow, shrink]
LOOKING = [dry_run, compare, measure]
#: compare's 1 says that images differ.
FAILED: dict[Command, int] = {compare: 2}

ALL = pytest.mark.parametrize("command", [*WRITING, *LOOKING])


class Runner:
    """Runs commands in this process, which takes a tenth of the time."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *words: str | Path) -> Result:
        code = main([str(word) for word in words])
        return Result(code, *self._capfd.readouterr())

    def refused(self, command: Command, path: Path, *parts: str) -> None:
        one_line(self(*command(path)), FAILED.get(command, 1), *parts)


@pytest.fixture
def qedfuse(capfd: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capfd)


@ALL
def test_no_image(qedfuse: Runner, command: Command, tmp_path: Path) -> None:
    qedfuse.refused(command, tmp_path / "nothing", "nothing: no such file")
    qedfuse.refused(command, tmp_path, f"{tmp_path}: is a directory")
    fifo, loop = tmp_path / "fifo", tmp_path / "loop"
    os.mkfifo(fifo)
    qedfuse.refused(command, fifo, f"{fifo}: ")
    loop.symlink_to(loop)
    qedfuse.refused(command, loop, f"{loop}: too many levels of symbolic links")
    for content in (b"", b"QED\0", b"QED\0" + bytes(1020), os.urandom(4096)):
        path = tmp_path / "image"
        path.write_bytes(content)
        if command not in (grow, shrink) or content.startswith(b"QED"):
            qedfuse.refused(command, path, f"{path}: ")
            assert path.read_bytes() == content


@ALL
@pytest.mark.parametrize("tool", ["qemu-io", "qemu-nbd"])
def test_in_use_by_qemu(qedfuse: Runner, command: Command, tool: str, tmp_path: Path) -> None:
    path = new_image(tmp_path / "image.qed", fill=1)
    before = path.read_bytes()
    with qemu_has_open(path) if tool == "qemu-io" else qemu_holding(tool, str(path), writable=True):
        qedfuse.refused(command, path, f"{path}: is in use by another process ({tool}, pid ", "close it there first")
        if command in (compare, measure):
            words = command(path)
            assert qedfuse(words[0], "-U", *words[1:]).code == 0
    assert path.read_bytes()[4096:] == before[4096:]  # but for its own mark in the header
    with qemu_holding("qemu-nbd", str(path), writable=False):
        if command in WRITING:
            qedfuse.refused(command, path, "is in use by another process (qemu-nbd")
        else:
            assert qedfuse(*command(path)).code == 0
    assert qedfuse(*command(path)).code == 0


def test_a_raw_disk_in_use(qedfuse: Runner, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    with qemu_holding("qemu-nbd", str(path), writable=True, format="raw"):
        done = qedfuse("resize", "-f", "raw", path, "2M")
        one_line(done, 1, f"{path}: is in use by another process (qemu-nbd, pid ")
        assert path.stat().st_size == MIB
    assert qedfuse("resize", "-f", "raw", path, "2M").code == 0


@ALL
def test_mounted(qedfuse: Runner, command: Command, source: Path, point: Path) -> None:
    path = new_image(source / "disk.qed", fill=1)
    with mounted(source, point) as mount, opened(point / "disk.raw", os.O_RDWR) as fd:
        os.pwrite(fd, b"x", 0)
        os.fsync(fd)
        before = path.read_bytes()
        line = f"{path}: is mounted on {point} (pid {mount.pid()}): unmount it first, with 'qedfuse umount {point}'"
        hint = ", or use -U to look at it anyway" if command in (compare, measure) else ""
        qedfuse.refused(command, path, f"qedfuse: {line}{hint}\n")
        assert path.read_bytes() == before
    assert qedfuse(*command(path)).code == 0


@pytest.mark.parametrize("command", WRITING)
def test_a_read_only_host(qedfuse: Runner, command: Command, source: Path) -> None:
    need_guest()
    path = new_image(source / "image.qed", fill=1)
    with filesystem(source, source, "--bind"):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(source)], check=True)
        qedfuse.refused(command, path, f"{path}: read-only file system")
        for other in LOOKING:
            assert qedfuse(*other(path)).code == 0


SYNC_FAILS = """
import errno, os, sys
from qedfuse.cli.main import main
from qedfuse.host.file_storage import FileStorage

async def sync(storage):
    raise OSError(errno.EIO, os.strerror(errno.EIO), storage.path)

FileStorage.sync = sync
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", [*WRITING, rename, stand_alone])
def test_a_disk_that_fails(command: Command, tmp_path: Path) -> None:
    """One line, with the file's name, and none of the log besides."""
    path = new_image(tmp_path / "image.qed", fill=1)
    with path.open("ab") as file:
        file.write(bytes(MIB))  # what compact gives back
    words = [sys.executable, "-c", SYNC_FAILS, *map(str, command(path))]
    done = subprocess.run(words, capture_output=True, text=True)
    one_line(Result(done.returncode, done.stdout, done.stderr), 1, f"qedfuse: {path}: input/output error")


@ALL
def test_a_symbolic_link_is_followed(qedfuse: Runner, command: Command, tmp_path: Path) -> None:
    path, link = new_image(tmp_path / "image.qed", "2M", fill=1), tmp_path / "link"
    link.symlink_to("image.qed")
    assert qedfuse(*command(link)).code == 0
    assert link.is_symlink() and path.is_file()


def test_a_block_device(qedfuse: Runner, tmp_path: Path) -> None:
    image = new_image(tmp_path / "image.qed", "4M", fill=1)
    with device_with(image, MIB) as device:
        for command in (compact, dry_run):
            qedfuse.refused(command, device, f"{device}: is a block device, which does not get shorter")
        assert qedfuse(*measure(device)).code == qedfuse(*compare(device)).code == 0
        one_line(qedfuse("resize", "-f", "raw", device, "2M"), 1, f"{device}: is a block device")
        assert qedfuse("resize", device, "8M") == (0, "Image resized.\n", "")
        assert qedfuse("resize", "--shrink", device, "1M") == (0, "Image resized.\n", "")
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(MIB))
    with device_with(raw, MIB) as device:
        one_line(qedfuse("resize", "-f", "raw", "--shrink", device, "512k"), 1, f"{device}: is a block device")
