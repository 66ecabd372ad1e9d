"""File names on the command line: empty ones, relative ones in a directory that is gone, one for two things."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.mounts.mounts import is_mounted, mounted, need_fuse
from tests.helpers.qemu.cli import Result, one_line, qedfuse, qemu_img, qemu_io

COMMANDS = {
    "mount SOURCE": ("mount", "", "MNT"),
    "mount MOUNTPOINT": ("mount", "IMAGE", ""),
    "mount second SOURCE": ("mount", "IMAGE", "", "MNT"),
    "mount --log-file": ("mount", "--log-file", "", "IMAGE", "MNT"),
    "mount --backing-root": ("mount", "--backing-root", "", "IMAGE", "MNT"),
    "fstab": ("IMAGE", "", "-o", "ro"),
    "umount": ("umount", ""),
    "status": ("status", ""),
    "create": ("create", "", "1M"),
    "info": ("info", ""),
    "info --untrusted": ("info", "--untrusted", ""),
    "map": ("map", ""),
    "check": ("check", ""),
    "convert SOURCE": ("convert", "", "MNT/x"),
    "convert TARGET": ("convert", "IMAGE", ""),
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", path, "1M")
    return path


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())
def test_an_empty_name_is_refused_by_name(image: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    point = tmp_path / "point"
    point.mkdir()
    here = tmp_path / "here"
    here.mkdir()
    args = [word.replace("IMAGE", str(image)).replace("MNT", str(point)) for word in words]
    result = qedfuse(*args, cwd=here)
    one_line(result, 1 if words[0] == "check" else 2, "the name is empty")
    assert not is_mounted(here)


def test_an_empty_first_word_is_no_command() -> None:
    one_line(qedfuse("", "/mnt"), 2, "no such command: ''")


@pytest.mark.parametrize("words", [("mount", "a.qed", "x"), ("umount", "x"), ("info", "a.qed"), ("create", "a", "1M")])
def test_relative_names_in_a_directory_that_is_gone(tmp_path: Path, words: tuple[str, ...]) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f'cd "{gone}" && rmdir "{gone}" && exec "$@"'
    result = qedfuse(*words, wrapper=("sh", "-c", script, "sh"))
    one_line(result, 1, words[1], "is a relative name, but the current directory was deleted")


@pytest.mark.parametrize("how", ["name", "hard link", "symbolic link"])
def test_an_image_over_itself_is_refused(image: Path, tmp_path: Path, how: str) -> None:
    point = tmp_path / "point"
    if how == "name":
        point = image
    elif how == "hard link":
        os.link(image, point)
    else:
        point.symlink_to(image)
    one_line(qedfuse("mount", image, point), 2, str(image), "is the mountpoint itself")
    assert not is_mounted(image)


def test_umount_names_bind_mounts(image: Path, tmp_path: Path) -> None:
    need_fuse()
    if os.geteuid() != 0:
        pytest.skip("needs root to make a bind mount")
    raw, other = tmp_path / "disk.raw", tmp_path / "other"
    raw.touch()
    other.touch()
    with mounted(image, raw) as mount:
        if subprocess.run(["mount", "--bind", str(raw), str(other)], capture_output=True, check=False).returncode:
            pytest.skip("no bind mount can be made here")
        with raw.open("r+b") as file:
            file.write(b"\1" * 512)
        one_line(mount.umount(), 1, str(raw), f"still mounted on {other}", "all is flushed")
        assert qedfuse("umount", other) == Result(0, "", "")
    qemu_io(image, "read -P 1 0 512")
