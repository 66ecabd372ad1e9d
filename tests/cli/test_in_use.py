"""A command on an image that one of our mounts has: it names the mount, and changes nothing."""

from __future__ import annotations

import os
import select
import signal
import socket
from pathlib import Path

import pytest

from qedfuse.daemon import serving
from qedfuse.daemon.rendezvous import abstract_name
from qedfuse.daemon.serving import find_serving
from qedfuse.host.file_id import FileId
from qedfuse.host.mountinfo import Mount
from tests.helpers.mounts.mounts import mounted, opened
from tests.helpers.qemu.cli import qedfuse, qemu_img


@pytest.fixture
def image(source: Path) -> Path:
    path = source / "disk.qed"
    qemu_img("create", "-f", "qed", path, "4M")
    return path


def way_out(point: Path, pid: int) -> str:
    return f"mounted on {point} (pid {pid}): unmount it first, with 'qedfuse umount {point}'"


def test_each_command_names_the_mount(image: Path, raw: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(b"x" * 4096)
    writing: list[tuple[str | Path, ...]] = [
        ("check", "-r", "leaks", image),
        ("create", image, "1M"),
        ("convert", "-O", "qed", other, image),
        ("convert", "-n", "-O", "qed", other, image),
    ]
    looking: list[tuple[str | Path, ...]] = [("info", image), ("map", image), ("check", image)]
    looking.append(("convert", image, tmp_path / "new.raw"))
    with mounted(image, raw) as mount:
        before = image.read_bytes()
        line = f"qedfuse: {image}: is {way_out(raw, mount.pid())}"
        for words in writing:
            assert qedfuse(*words) == (1, "", line + "\n"), words
        in_place = qedfuse("convert", "--in-place", "-f", "qed", "-O", "raw", image)
        assert in_place == (1, "", f"{line}; {image} is unchanged\n")
        for words in looking:
            assert qedfuse(*words) == (1, "", f"{line}, or use -U to look at it anyway\n"), words
        assert image.read_bytes() == before
    for words in (*looking, *writing):
        assert qedfuse(*words).code == 0, words


def test_it_goes_by_the_file_and_not_by_its_name(image: Path, raw: Path) -> None:
    link, moved = image.with_name("link.qed"), image.with_name("moved.qed")
    link.symlink_to(moved)
    with mounted(image, raw) as mount:
        image.rename(moved)
        qemu_img("create", "-f", "qed", image, "4M")
        assert qedfuse("info", image).code == 0
        for name in (moved, link):
            assert f"{name}: is {way_out(raw, mount.pid())}" in qedfuse("info", name).err
        image.unlink()
        moved.rename(image)


def test_a_file_below_a_mounted_image(image: Path, source: Path, point: Path) -> None:
    base = source.parent / "base.qed"
    image.rename(base)
    qemu_img("create", "-f", "qed", "-b", base, "-F", "qed", image)
    with mounted(source, point) as mount, opened(point / "disk.raw"):
        line = f"qedfuse: {base}: is the backing file of an image that is {way_out(point, mount.pid())}\n"
        assert qedfuse("check", "-r", "all", base) == (1, "", line)


def test_a_name_with_a_space(image: Path, tmp_path: Path) -> None:
    raw = tmp_path / "a disk"
    raw.touch()
    with mounted(image, raw):
        assert f"with 'qedfuse umount '{raw}''" in qedfuse("check", "-r", "all", image).err


def test_a_daemon_that_is_stopped_does_not_hold_it_up(image: Path, raw: Path) -> None:
    with mounted(image, raw) as mount:
        pid = mount.pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            err = qedfuse("check", "-r", "all", image).err
        finally:
            os.kill(pid, signal.SIGCONT)
        assert f"{image}: is in use by another process" in err


def test_many_daemons_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [f"mute{number}:{os.getpid()}" for number in range(9)]
    mounts = [Mount(1, 0, name, "/", "/mnt", "fuse.qedfuse", "x", f"user_id={os.geteuid()}") for name in devices]
    monkeypatch.setattr(serving, "read_mounts", lambda: mounts)
    monkeypatch.setattr(serving, "_PATIENCE", 0.05)
    monkeypatch.setattr(serving, "_PATIENCE_FOR_ALL", 0.1)
    listeners = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in devices]
    for listener, device in zip(listeners, devices, strict=True):
        listener.bind(abstract_name(device))
        listener.listen()
    assert find_serving(FileId.at(tmp_path)) is None
    asked = [bool(select.select([listener], [], [], 0)[0]) for listener in listeners]
    for listener in listeners:
        listener.close()
    assert 1 <= sum(asked) <= 3
