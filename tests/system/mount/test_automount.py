"""Mounts that autofs, or systemd's automount, asks for: only their process group may look at the mountpoint until then.

The test is the automounter, and speaks the kernel's protocol: the mountpoint is a trigger, a process that looks into it
waits, and the command that is to mount over it is run. Source: linux/auto_fs.h, Documentation/filesystems/autofs.rst.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.mounts.mounts import EXTRA_OPTIONS, need_fuse, new_namespace
from tests.helpers.qemu.cli import environment, qemu_img, qemu_io

#: argv: the mountpoint, a command that mounts over it, and one that looks into it, both in JSON. Prints, as JSON, the
#: exit code and the output of each.
_AUTOMOUNTER = """
import ctypes, fcntl, json, os, select, signal, struct, subprocess, sys

READY, FAIL, MISSING_DIRECT = 0x9360, 0x9361, 5
point, mounting, looking = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
os.setpgid(0, 0)
libc = ctypes.CDLL(None, use_errno=True)
reader, writer = os.pipe()
options = f"fd={writer},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
if libc.mount(b"test", point.encode(), b"autofs", 0, options.encode()):
    print(json.dumps({"unable": os.strerror(ctypes.get_errno())}))
    sys.exit()
os.close(writer)
control = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
looker = subprocess.Popen(looking, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
result = {}
try:
    assert select.select([reader], [], [], 20)[0], "nobody asks"
    packet = os.read(reader, 4096)
    version, kind, token = struct.unpack_from("iiI", packet)
    assert (version, kind) == (5, MISSING_DIRECT), (version, kind)
    mounter = subprocess.Popen(mounting, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        out = mounter.communicate(timeout=20)[0].decode()
    except subprocess.TimeoutExpired:
        out = "hangs"
    result["mount"] = [mounter.poll(), out]
    fcntl.ioctl(control, READY if mounter.returncode == 0 else FAIL, token)
    if mounter.returncode == 0:
        result["look"] = [0, looker.communicate(timeout=20)[0].decode()]
        result["look"][0] = looker.returncode
        found = subprocess.run([*mounting[:3], "umount", point], capture_output=True, text=True, timeout=20)
        result["umount"] = [found.returncode, found.stdout + found.stderr]
finally:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.close(control)
    os.close(reader)  # whatever waits gets an error
    libc.umount2(point.encode(), 2)
    looker.kill()
    print(json.dumps(result), flush=True)
    os.killpg(os.getpgrp(), signal.SIGTERM)
"""


@pytest.fixture
def point(tmp_path: Path) -> Path:
    need_fuse()
    if os.geteuid() != 0:
        pytest.skip("mounting autofs needs root")
    filesystems = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
    if "autofs" not in filesystems:
        pytest.skip("the kernel has no autofs")
    path = tmp_path.resolve() / "point"
    path.mkdir()
    return path


def automount(point: Path, mounting: list[str], looking: list[str]) -> dict[str, Any]:
    words = [sys.executable, "-c", _AUTOMOUNTER, str(point), json.dumps(mounting), json.dumps(looking)]
    done = subprocess.run(
        [*new_namespace(), *words], env=environment(), cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.stdout, done
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    if "unable" in result:
        pytest.skip(f"no autofs to be mounted here: {result['unable']}")
    return result


@pytest.mark.parametrize("options", [["-o", "rw,noatime"], ["-o", "ro"]], ids=["rw", "ro"])
def test_the_automounter_is_not_asked_by_its_own_mount(tmp_path: Path, point: Path, options: list[str]) -> None:
    image = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", image, "1M")
    qemu_io(image, "write -P 65 0 64k")
    log = ["--log-file", str(tmp_path / "log")]
    mounting = [sys.executable, "-m", "qedfuse", "mount", *log, *EXTRA_OPTIONS, str(image), str(point), *options]
    result = automount(point, mounting, ["head", "-c", "3", str(point / "disk.raw")])
    assert result == {"mount": [0, ""], "look": [0, "AAA"], "umount": [0, ""]}
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_source_directory_is_mounted_as_well(tmp_path: Path, point: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    qemu_img("create", "-q", "-f", "qed", source / "disk.qed", "1M")
    log = ["--log-file", str(tmp_path / "log")]
    mounting = [sys.executable, "-m", "qedfuse", *EXTRA_OPTIONS, str(source), str(point), "-o", "rw", *log]
    result = automount(point, mounting, ["ls", str(point)])
    assert result == {"mount": [0, ""], "look": [0, "disk.raw\n"], "umount": [0, ""]}


def test_a_mount_that_fails_is_an_error_to_the_one_who_looks(tmp_path: Path, point: Path) -> None:
    mounting = [sys.executable, "-m", "qedfuse", "mount", str(tmp_path / "no.qed"), str(point)]
    code, text = automount(point, mounting, ["ls", str(point)])["mount"]
    assert code == 1 and "no such file" in text


def test_a_backing_file_on_what_is_mounted_on_demand(tmp_path: Path, point: Path) -> None:
    """Looking for it a component at a time triggers the automount, as looking for the whole name does."""
    behind = tmp_path / "behind"
    behind.mkdir()
    (behind / "base.raw").write_bytes(b"b" * (1 << 20))
    top = tmp_path / "top.qed"
    qemu_img("create", "-q", "-u", "-f", "qed", "-b", point / "base.raw", "-F", "raw", top, "1M")
    mount = f'if test $0 = umount; then umount "$1"; else mount --bind {behind} {point}; fi'
    mapping = [sys.executable, "-m", "qedfuse", "map", "--output=json", str(top)]
    result = automount(point, ["sh", "-c", mount, "mount"], mapping)
    assert result["mount"] == [0, ""]
    code, text = result["look"]
    assert code == 0, text
    assert json.loads(text)[0]["depth"] == 1
