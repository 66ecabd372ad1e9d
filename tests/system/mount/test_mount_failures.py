"""Mounts that cannot be: one line, an exit code, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.mounts.mounts import is_mounted, mounted, need_fuse, new_namespace, wait_for_exit
from tests.helpers.qemu.cli import environment, one_line, qedfuse, qemu_has_open, qemu_img


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", path, "1M")
    return path


@pytest.fixture(autouse=True)
def _fuse() -> None:
    need_fuse()


BOTH = pytest.mark.parametrize("words", [[], ["-f"]], ids=["background", "foreground"])


@BOTH
def test_no_mountpoint(image: Path, tmp_path: Path, words: list[str]) -> None:
    missing = tmp_path / "missing"
    one_line(qedfuse("mount", *words, image, missing), 1, str(missing), "does not exist", "create")
    one_line(qedfuse("mount", *words, image, "/dev/null"), 2, "/dev/null", "regular file or a directory")


@BOTH
def test_no_image(tmp_path: Path, raw: Path, words: list[str]) -> None:
    missing = tmp_path / "missing.qed"
    one_line(qedfuse("mount", *words, missing, raw), 1, str(missing), "no such file")
    assert not is_mounted(raw)


@BOTH
def test_not_an_image(tmp_path: Path, raw: Path, words: list[str]) -> None:
    noise = tmp_path / "noise.qed"
    noise.write_bytes(b"noise" * 1000)
    one_line(qedfuse("mount", *words, noise, raw), 1, str(noise), "not a qed image")
    fifo = tmp_path / "fifo.qed"
    os.mkfifo(fifo)
    one_line(qedfuse("mount", *words, fifo, raw), 1, str(fifo), "not a regular file")
    assert not is_mounted(raw)


@BOTH
def test_one_bad_image_of_several(image: Path, tmp_path: Path, words: list[str]) -> None:
    point = tmp_path / "mnt"
    point.mkdir()
    (tmp_path / "bad.qed").touch()
    one_line(qedfuse("mount", *words, image, tmp_path / "bad.qed", point), 1, "bad.qed")
    assert not is_mounted(point)
    with mounted(image, point):
        assert os.listdir(point) == ["disk.raw"]


@BOTH
def test_an_image_in_use(image: Path, raw: Path, words: list[str]) -> None:
    with qemu_has_open(image):
        one_line(qedfuse("mount", *words, image, raw), 1, str(image), "in use", "qemu-io")
    assert not is_mounted(raw)


def test_backing_files_that_are_refused(image: Path, raw: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qed"
    qemu_img("create", "-q", "-f", "qed", "-b", image, "-F", "qed", overlay)
    inside = tmp_path / "inside"
    inside.mkdir()
    for words in (["--no-backing"], ["-o", "no_backing"]):
        one_line(qedfuse("mount", *words, overlay, raw), 1, str(overlay), "--no-backing")
    for words in (["--backing-root", str(inside)], ["-o", f"ro,backing_root={inside}"]):
        one_line(qedfuse("mount", *words, overlay, raw), 1, str(overlay), "--backing-root")
    one_line(qedfuse("mount", "--backing-root", tmp_path / "no", overlay, raw), 2, "not a directory")
    with mounted("--backing-root", tmp_path, overlay, raw):
        assert raw.stat().st_size == 1 << 20
    image.unlink()
    one_line(qedfuse("mount", overlay, raw), 1, str(overlay), str(image), "no such file")


def test_several_images_over_a_file(image: Path, raw: Path, tmp_path: Path) -> None:
    shutil.copy(image, tmp_path / "other.qed")
    one_line(qedfuse("mount", image, tmp_path / "other.qed", raw), 2, str(raw), "one image")


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("bogus", "unknown mount option 'bogus'"),
        ("uid=root", "not a numeric id"),
        ("umask=9", "not an octal mask"),
        ("uid", "needs a value"),
        ("direct_io=1", "takes no value"),
    ],
)
def test_options_that_make_no_sense(image: Path, raw: Path, option: str, reason: str) -> None:
    one_line(qedfuse("mount", "-o", option, image, raw), 2, reason)
    assert not is_mounted(raw)


def test_a_log_file_that_cannot_be(image: Path, raw: Path, tmp_path: Path) -> None:
    one_line(qedfuse("mount", "--log-file", tmp_path / "no" / "log", image, raw), 1, "no such file")
    assert not is_mounted(raw)


def test_libfuse_says_why(image: Path, raw: Path) -> None:
    """Without /dev/fuse, in a mount namespace of its own."""
    script = 'mount --bind /dev/null /dev/fuse && exec "$@"'
    wrapper = (*new_namespace(), "sh", "-c", script, "sh")
    for words in ([], ["-f"]):
        one_line(qedfuse("mount", *words, image, raw, wrapper=wrapper), 1, str(raw), "cannot mount", "fuse")
    with mounted(image, raw):  # the image is free again
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_start_that_is_interrupted_leaves_nothing(image: Path, raw: Path, number: signal.Signals) -> None:
    """At some point between the first instruction and being mounted."""
    for delay in (0.0, 0.15, 0.2, 0.25, 0.3):
        command = [sys.executable, "-m", "qedfuse", "mount", "-f", str(image), str(raw)]
        with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                pass
            process.send_signal(number)
            _out, err = process.communicate(timeout=20)
        wait_for_exit(process.pid)
        if number == signal.SIGKILL and is_mounted(raw):
            subprocess.run(["umount", "-l", str(raw)], check=True)
        assert not is_mounted(raw), (delay, err)
        # While Python itself is starting, or in the middle of an import (then with a file that was left open).
        assert "Traceback" not in err or "KeyboardInterrupt" in err or "importlib._bootstrap" in err, err
    with mounted(image, raw):
        assert raw.stat().st_size == 1 << 20
