"""Crafted images from outside: what `info --untrusted` opens, confined backing files, and mounts of hostile images."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

from tests.helpers.images.corpus import CASES
from tests.helpers.images.hostile import GOOD, C, good, over
from tests.helpers.mounts.mounts import find_daemon, is_mounted, mounted, need_fuse
from tests.helpers.qemu.cli import environment, one_line, qedfuse

# -- info --untrusted -------------------------------------------------------------------------------------------------


def opened_by(image: Path, *words: str) -> tuple[int, set[str], str]:
    """The exit code of a command, and all names that it gave to the kernel."""
    trace = image.parent.parent / "trace"
    command = ["strace", "-f", "-qq", "-s", "8192", "-e", "trace=%file,connect,execve", "-o", str(trace)]
    command += [sys.executable, "-m", "qedfuse", *words, str(image)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    text = trace.read_text(errors="replace")
    assert "execve(" in text, "strace has written down nothing"
    return done.returncode, set(re.findall(r'"((?:[^"\\]|\\.)*)"', text)), done.stderr


@pytest.mark.parametrize(
    "kind", ["absolute", "relative", "link", "fifo", "json", "nbd", "itself", "missing", "not closed"]
)
def test_untrusted_opens_nothing_but_the_image(tmp_path: Path, kind: str) -> None:
    """Not even to look whether it is there: by the system calls of the whole process."""
    directory = tmp_path / "images"
    directory.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (directory / "link").symlink_to(secret)
    os.mkfifo(directory / "fifo")
    name = {
        "absolute": os.fsencode(secret),
        "json": b'json:{"driver":"raw","file":{"driver":"file","filename":"%s"}}' % os.fsencode(secret),
        "nbd": b"nbd+unix:///?socket=" + os.fsencode(secret),
        "relative": b"../secret",
        "itself": b"image.qed",
        "not closed": b"../secret",
    }.get(kind, os.fsencode(kind))
    plain = good()(directory)
    code, usual, _ = opened_by(plain, "info", "--untrusted")
    assert code == 0
    assert str(plain) in usual
    image = over(name, features=3 if kind == "not closed" else 1)(directory)
    code, names, err = opened_by(image, "info", "--untrusted")
    assert code == 1
    assert "not to be trusted: it refers to another file" in err and err.count("\n") == 1
    assert names <= usual, "it has asked the kernel for something that it does not need for a harmless image"


def test_the_trace_sees_what_is_opened(tmp_path: Path) -> None:
    """The test above can fail."""
    directory = tmp_path / "images"
    directory.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    code, names, _ = opened_by(over(b"../secret", features=5)(directory), "info", "--backing-chain")
    assert code == 0
    assert "secret" in names, "a name is walked a component at a time"


# -- --backing-root and --no-backing ----------------------------------------------------------------------------------

#: What an overlay may name, how `--backing-root` refuses it, and whether it is refused without.
NAMES = [
    ("/etc/passwd", "--backing-root"),
    ("../..", "--backing-root"),
    ("../outside", "--backing-root"),
    ("link", "--backing-root"),
    ("linked/outside", "--backing-root"),
    ("../outside-and-missing", "--backing-root"),
    ("fifo", "not a regular file"),
    ("socket", "not a regular file"),
    ("/dev/zero", "--backing-root"),
    ("linked-device", "--backing-root"),
    ("directory", "it is a directory"),
    ('json:{"driver":"file","filename":"/etc/passwd"}', "not json: names"),
    ("nbd://localhost:10809/x", "not nbd: names"),
    ("middle.qed", "--backing-root"),  # which names /etc/passwd
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with everything in it that is to be refused."""
    root = tmp_path / "root"
    (root / "directory").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(bytes(8192))
    (root / "inside").write_bytes(bytes(8192))
    (root / "link").symlink_to("../outside")
    (root / "linked").symlink_to("..")
    (root / "linked-device").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo")
    os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
    over(b"/etc/passwd", features=5)(root).rename(root / "middle.qed")
    return root


@pytest.mark.parametrize("command", ["map", "info", "mount --ro", "mount"])
@pytest.mark.parametrize(("name", "text"), NAMES)
def test_confined(root: Path, name: str, text: str, command: str) -> None:
    image = over(name.encode())(root)
    words = command.split()
    target: list[Path] = []
    if words[0] == "mount":
        need_fuse()
        (root / "raw").touch()
        target = [root / "raw"]
    one_line(qedfuse(*words, "--backing-root", root, image, *target), 1, text)
    one_line(qedfuse(*words, "--no-backing", image, *target), 1, "" if ":" in name else "--no-backing")
    assert not is_mounted(root / "raw")


@pytest.mark.parametrize("command", ["map", "info"])
def test_what_is_inside_is_allowed(root: Path, command: str) -> None:
    image = over(b"inside")(root)
    assert qedfuse(*command.split(), "--backing-root", root, image).code == 0
    one_line(qedfuse(*command.split(), "--backing-root", root / "inside", image), 2, "not a directory")


# -- mounts -----------------------------------------------------------------------------------------------------------


def peak_memory(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) << 10


T = TypeVar("T")


def attempt(action: Callable[[], T]) -> T | None:
    """What it gives, or None for EIO, the one error that is expected."""
    try:
        return action()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None


def outcome(path: Path, size: int) -> list[bytes | None] | None:
    """What reading a file gives at several places; None: it cannot be opened."""
    fd = attempt(lambda: os.open(path, os.O_RDONLY))
    if fd is None:
        return None
    try:
        places = sorted({0, 4096, 12288, 1 << 20, size // 2 // 512 * 512, max(0, size - 512)})
        return [attempt(lambda at=at: os.pread(fd, min(8192, max(512, size - at)), at)) for at in places]  # type: ignore[misc]
    finally:
        os.close(fd)


def change(path: Path, size: int) -> bool:
    """Write here and there; whatever cannot be done is an errno. Returns whether it can be opened for writing."""
    fd = attempt(lambda: os.open(path, os.O_RDWR))
    if fd is None:
        return False
    try:
        for at in sorted({0, 4096 + 512, 12288, max(0, size - 512)}):
            with suppress(OSError):
                os.pwrite(fd, b"changed" * 100, at)
        with suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)
    return True


HEADERS = [case for case in CASES if case.info and not case.size]
TABLES = [case for case in CASES if not (case.opens or case.size or case.untrusted == "another file")]


def test_a_directory_of_hostile_images(tmp_path: Path) -> None:
    """All of them at once: none hurts the others, the daemon or its memory."""
    source, point = tmp_path / "images", tmp_path / "mnt"
    source.mkdir()
    point.mkdir()
    good()(source).rename(source / "sound.qed")
    for number, case in enumerate([*HEADERS, *TABLES]):
        case.build(source).rename(source / f"{number}.qed")
    names = {f"{number}.raw": case for number, case in enumerate([*HEADERS, *TABLES])}
    read = refused = 0
    with mounted(source, point) as mount:
        pid = find_daemon(point)
        listed = set(os.listdir(point))
        assert "sound.raw" in listed
        for name in sorted(listed & set(names)):
            path, start = point / name, time.monotonic()
            size = path.stat().st_size
            found = outcome(path, size)
            if found is None:
                refused += 1
            else:
                read += 1
                assert None not in found or names[name].check == 2, names[name].name
                assert change(path, size) or names[name].check == 2, names[name].name
            assert time.monotonic() - start < 30, names[name].name
            assert find_daemon(point) == pid
        assert (point / "sound.raw").read_bytes()[: 2 * C] == b"\x45" * C + b"\x46" * C
        assert peak_memory(pid) < 250 << 20
        mount.umount()
        log = mount.text()
    assert "internal error" not in log and "Traceback" not in log, log
    print(f"figures: {len(listed)} files of {len(names) + 1} images: {read} read, {refused} refused")
    assert read > 60 and len(names) > 100


@pytest.mark.parametrize("case", HEADERS[::9], ids=[case.name for case in HEADERS[::9]])
def test_a_mount_that_is_refused(case: object, tmp_path: Path) -> None:
    need_fuse()
    image = next(known for known in CASES if known is case).build(tmp_path)
    raw = tmp_path / "raw"
    raw.touch()
    result = qedfuse("mount", image, raw)
    one_line(result, 1, str(image))
    assert not is_mounted(raw)


def test_a_bad_entry_is_one_bad_place(tmp_path: Path) -> None:
    """EIO there, data everywhere else, and the rest can be written."""
    image = good(l2={3: 1 << 40})(tmp_path)
    raw = tmp_path / "raw"
    raw.touch()
    with mounted("-o", "direct_io", image, raw):
        fd = os.open(raw, os.O_RDWR)
        try:
            assert os.pread(fd, 2 * C, 0) == b"\x45" * C + b"\x46" * C
            for action in (lambda: os.pread(fd, C, 3 * C), lambda: os.pwrite(fd, b"x" * C, 3 * C)):
                with pytest.raises(OSError) as caught:
                    action()
                assert caught.value.errno == errno.EIO
            assert os.pwrite(fd, b"y" * C, 5 * C) == C
            os.fsync(fd)
            assert os.pread(fd, C, 5 * C) == b"y" * C
        finally:
            os.close(fd)
    assert GOOD.image_size == 3 * 1024 * C
