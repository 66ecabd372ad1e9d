"""An ordinary user's mounts, through fusermount3."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.mounts.mounts import is_mounted, mounted, need_fuse
from tests.helpers.qemu.cli import Result, environment, one_line, qemu_img, qemu_io

NOBODY = 65534


@pytest.fixture(autouse=True)
def _dev_fuse() -> Iterator[None]:
    """As it is everywhere but in a minimal system: for everybody."""
    need_fuse()
    if os.geteuid() != 0:
        pytest.skip("needs root to be somebody else")
    if shutil.which("runuser") is None:
        pytest.skip("runuser is not installed")
    before = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", 0o666)
    try:
        yield
    finally:
        os.chmod("/dev/fuse", before)


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that nobody owns; pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="qedfuse-user-"))
    try:
        path.chmod(0o755)
        for name in ("disk.qed", "disk.raw"):
            (path / name).touch()
        qemu_img("create", "-q", "-f", "qed", path / "disk.qed", "8M")
        qemu_io(path / "disk.qed", "write -P 3 0 64k")
        for entry in (path, *path.iterdir()):
            os.chown(entry, NOBODY, NOBODY)
        yield path
    finally:
        if is_mounted(path / "disk.raw"):
            subprocess.run(["umount", "-l", str(path / "disk.raw")], check=True)
        shutil.rmtree(path)


#: Python may be installed where only root looks, so it starts as root and changes over when all is loaded.
_DROP = f"""
import ctypes, importlib, os, pkgutil, sys
import qedfuse.fuse.fastpath
import qedfuse, pyfuse3, trio, difflib, socket, select, encodings.ascii, encodings.utf_8, encodings.idna
for module in pkgutil.walk_packages(qedfuse.__path__, "qedfuse."):
    if module.name != "qedfuse.__main__":
        importlib.import_module(module.name)
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
ctypes.CDLL(None).prctl(4, 1)  # dumpable again, as a program that nobody has started
os.environ["HOME"] = "/"
"""
_RUN = _DROP + "from qedfuse.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"


def run(*words: str | Path) -> Result:
    """`qedfuse` as nobody."""
    return _python(_RUN, *words)


def _python(script: str, *words: str | Path) -> Result:
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, env=environment(), cwd="/", capture_output=True, text=True, timeout=60, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
    words = ["runuser", "-u", "nobody", "--", *command]
    return subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=60, check=False)


def test_a_user_mounts_writes_and_unmounts(home: Path) -> None:
    image, raw = home / "disk.qed", home / "disk.raw"
    assert run("mount", "--log-file", home / "log", image, raw) == Result(0, "", "")
    assert as_nobody("stat", "-c", "%s %u %a", str(raw)).stdout.split() == [str(8 << 20), str(NOBODY), "644"]
    assert as_nobody("sh", "-c", f"printf hello | dd of={raw} conv=notrunc,fsync bs=1").returncode == 0
    assert as_nobody("head", "-c", "6", str(raw)).stdout == "hello\3"
    assert "pid" in run("status", raw).out
    with pytest.raises(PermissionError):
        raw.open("rb")  # not even root
    assert run("umount", raw) == Result(0, "", "")
    assert not is_mounted(raw)
    qemu_img("check", image)
    qemu_io(image, f"read -P {ord('h')} 0 1")


def test_root_may_unmount_it(home: Path) -> None:
    image, raw = home / "disk.qed", home / "disk.raw"
    assert run("mount", "--log-file", home / "log", image, raw) == Result(0, "", "")
    done = subprocess.run(
        [sys.executable, "-m", "qedfuse", "umount", str(raw)], env=environment(), capture_output=True, check=False
    )
    assert done.returncode == 0, done
    qemu_img("check", image)


def test_a_user_may_not_unmount_others(home: Path, tmp_path: Path) -> None:
    image, raw = home / "disk.qed", home / "disk.raw"
    with mounted(image, raw, "--log-file", tmp_path / "log"):
        result = run("umount", raw)
        assert result.code == 1 and "Traceback" not in result.err
        assert is_mounted(raw)
        one_line(run("status", raw), 1, str(raw), "daemon")


def test_a_user_cannot_mount_what_he_cannot_read(home: Path) -> None:
    image, raw = home / "disk.qed", home / "disk.raw"
    os.chown(image, 0, 0)
    image.chmod(0o600)
    one_line(run("mount", image, raw), 1, str(image), "permission denied")
    image.chmod(0o644)
    assert run("mount", "--log-file", home / "log", image, raw) == Result(0, "", "")
    assert as_nobody("stat", "-c", "%u %a", str(raw)).stdout.split() == ["0", "444"]
    assert as_nobody("head", "-c", "1", str(raw)).stdout == "\3"
    assert as_nobody("dd", "if=/dev/zero", f"of={raw}", "count=1").returncode != 0
    assert run("umount", raw) == Result(0, "", "")


def test_allow_other_needs_leave(home: Path) -> None:
    image, raw = home / "disk.qed", home / "disk.raw"
    conf = Path("/etc/fuse.conf")
    if conf.exists() and any(line.strip() == "user_allow_other" for line in conf.read_text().splitlines()):
        pytest.skip("user_allow_other is set here")
    one_line(run("mount", "-o", "allow_other", image, raw), 1, str(raw), "allow_other")
    assert not is_mounted(raw)


def test_others_have_what_owner_and_mode_say(home: Path, tmp_path: Path) -> None:
    """root's mount with allow_other: the kernel enforces the image's permissions."""
    image, raw = home / "disk.qed", home / "disk.raw"
    os.chown(image, 0, 0)
    log = ("--log-file", tmp_path / "log")
    for mode, readable, writable in ((0o600, False, False), (0o644, True, False), (0o666, True, True)):
        image.chmod(mode)
        with mounted("-o", "allow_other", image, raw, *log):
            assert (as_nobody("head", "-c", "1", str(raw)).returncode == 0) is readable
            assert (as_nobody("dd", "if=/dev/null", f"of={raw}", "conv=notrunc").returncode == 0) is writable
            assert as_nobody("chmod", "777", str(raw)).returncode != 0
            assert as_nobody("chown", "nobody", str(raw)).returncode != 0
    with mounted("-o", f"allow_other,uid={NOBODY},umask=077", image, raw, *log):
        assert as_nobody("head", "-c", "1", str(raw)).stdout == "\3"
    with mounted(image, raw, *log):
        assert as_nobody("head", "-c", "1", str(raw)).returncode != 0  # without allow_other only root


def test_a_daemon_of_a_user_cannot_be_talked_to_by_others(home: Path) -> None:
    from qedfuse.daemon.control import Client
    from tests.helpers.mounts.mounts import mount_at

    image, raw = home / "disk.qed", home / "disk.raw"
    with mounted("-o", "allow_other", image, raw):
        mount = mount_at(raw)
        assert mount is not None
        script = _DROP + (
            "from qedfuse.daemon.rendezvous import abstract_name\n"
            "s = socket.socket(socket.AF_UNIX)\n"
            "s.settimeout(20)\n"
            "s.connect(abstract_name(sys.argv[1]))\n"
            "try:\n"
            '    s.sendall(b\'{"command": "status"}\\n\')\n'
            "    print(s.recv(100))\n"
            "except ConnectionError:\n"
            "    print(b'')\n"
            "s.close()\n"
        )
        assert _python(script, mount.device) == Result(0, "b''\n", "")
        with Client(mount) as client:
            assert client.ask("status")["pid"]
