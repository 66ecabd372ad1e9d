"""Names in other encodings than UTF-8: the kernel's are bytes, and so are those of a mount."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qedfuse.host.mountinfo import parse_mount
from tests.helpers.mounts.mounts import EXTRA_OPTIONS, need_fuse, wait_until
from tests.helpers.qemu.cli import Result, environment

#: Locale, its source, its character map, and a name in it.
LOCALES = {
    "de_DE.ISO-8859-1": ("de_DE", "ISO-8859-1", "Gerät ö".encode("latin-1")),
    "zh_TW.BIG5": ("zh_TW", "BIG5", "成功 x".encode("big5")),  # the second byte of one is a backslash
}


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("localedef") is None or not os.path.isdir("/usr/share/i18n/locales"):
        pytest.skip("no localedef, or no locales to compile")
    directory = tmp_path_factory.mktemp("locales")
    for name, (source, charmap, _) in LOCALES.items():
        command = ["localedef", "--no-archive", "-c", "-i", source, "-f", charmap, str(directory / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not (directory / name).exists():
            pytest.skip(f"localedef: {done.stderr.strip()}")
    return directory


@pytest.fixture(params=[*LOCALES, "C"])
def surroundings(request: pytest.FixtureRequest, locales: Path) -> tuple[dict[str, str], bytes]:
    """The environment of a locale, and a name."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    env = {**plain, "PYTHONPATH": environment()["PYTHONPATH"], "LOCPATH": str(locales), "LC_ALL": request.param}
    if request.param == "C":  # and none of Python's kindness
        return {**env, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "Gerät ö".encode()
    script = "import sys; print(sys.getfilesystemencoding())"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    if done.stdout.strip() == "utf-8":
        pytest.skip(f"no locale {request.param} here")
    return env, LOCALES[request.param][2]


def run(env: dict[str, str], *words: bytes | str) -> Result:
    options = EXTRA_OPTIONS if words[0] == "mount" else []
    command = [sys.executable, "-m", "qedfuse", words[0], *options, *words[1:]]
    done = subprocess.run(command, env=env, capture_output=True, timeout=60)
    return Result(done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr))


@pytest.mark.parametrize("over_file", [True, False], ids=["file", "directory"])
def test_a_mount(surroundings: tuple[dict[str, str], bytes], tmp_path: Path, over_file: bool) -> None:
    need_fuse()
    env, name = surroundings
    home = os.fsencode(tmp_path) + b"/" + name
    os.mkdir(home)
    image, point, log = home + b"/" + name + b".qed", home + b"/p " + name, home + b"/log"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qed", image, "1M"], check=True)
    subprocess.run(["qemu-io", "-f", "qed", "-c", "write -P 65 0 64k", image], check=True, capture_output=True)
    if over_file:
        open(point, "w").close()
    else:
        os.mkdir(point)
    source = image if over_file else home
    raw = point if over_file else point + b"/" + name + b".raw"
    if not over_file:  # a source that would hide itself is refused
        source = os.fsencode(tmp_path) + b"/source " + name
        os.mkdir(source)
        os.rename(image, source + b"/" + name + b".qed")
    assert run(env, "mount", "--log-file", log, source, point) == Result(0, "", "")
    try:
        with open(raw, "rb") as file:
            assert file.read(3) == b"AAA"
            result = run(env, "umount", point)
            assert result.code == 1 and "is in use" in result.err and result.err.count("\n") == 1
        again = run(env, "mount", source, point)
        assert again.code == 1 and "already a qedfuse mount" in again.err and again.err.count("\n") == 1
        assert run(env, "status", point).code == 0
        assert run(env, "umount", point) == Result(0, "", "")
        with open(log, "rb") as file:
            text = file.read()
        assert b"mounted on" in text and b"closed" in text and b"native fast path" not in text
    finally:
        subprocess.run(["umount", "-l", point], capture_output=True)


def test_a_loop_device_is_named(surroundings: tuple[dict[str, str], bytes], tmp_path: Path) -> None:
    need_fuse()
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("needs root and loop devices")
    env, name = surroundings
    image, raw = os.fsencode(tmp_path) + b"/disk.qed", os.fsencode(tmp_path) + b"/" + name
    subprocess.run(["qemu-img", "create", "-q", "-f", "qed", image, "1M"], check=True)
    open(raw, "w").close()
    log = os.fsencode(tmp_path) + b"/log"
    assert run(env, "mount", "--log-file", log, image, raw) == Result(0, "", "")
    try:
        device = subprocess.run(["losetup", "--find", "--show", raw], check=True, capture_output=True).stdout.strip()
        try:
            result = run(env, "umount", raw)
            assert result.code == 1 and f"by loop device {device.decode()}" in result.err
        finally:
            subprocess.run(["losetup", "-d", device], check=True)
        wait_until(lambda: run(env, "umount", raw).code == 0)
    finally:
        subprocess.run(["umount", "-l", raw], capture_output=True)


def test_a_line_is_taken_apart_before_it_is_decoded() -> None:
    for name in (b"/m/\xa5\xff\xe4", b"/m/a b\tc\nd\\040"):
        escaped = b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes((byte,)) for byte in name)
        found = parse_mount(b"36 35 0:53 / %s rw - fuse.qedfuse %s rw,user_id=7\n" % (escaped, escaped))
        assert os.fsencode(found.mountpoint) == os.fsencode(found.source) == name
        assert found.owner == 7
