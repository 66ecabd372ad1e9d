"""Names of backing files: which file they open, and which they must not."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from qedfuse.chain.backing import open_backing_file, resolve_backing
from qedfuse.chain.policy import BackingPolicy
from qedfuse.errors import FormatError, QedfuseError, UnsupportedError
from qedfuse.text import describe
from tests.helpers.doubles.shortage import SHORTAGES, each_call_fails
from tests.helpers.images.chains import (
    SIZE,
    make_qed,
    make_raw,
    our_bytes,
    pattern,
    qemu_bytes,
    refusal,
)
from tests.helpers.qemu.cli import one_line, qedfuse, tool

NO_BACKING = BackingPolicy(allowed=False)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base.raw", "./base.raw", "sub/../base.raw", "../here/base.raw", "x:y/../base.raw"])
@pytest.mark.parametrize("prefix", ["", "file:"])
def test_relative_names_are_relative_to_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, prefix: str
) -> None:
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    make_raw(here / "base.raw")
    if ":" in name and not prefix:
        name = "./" + name  # a colon behind a slash is no protocol's
    (here / "x:y").mkdir()
    image = make_qed(here / "top.qed", prefix + name, raw=True)
    for directory, path in ((tmp_path, "here/top.qed"), (here, "top.qed"), (Path("/"), str(image))):
        monkeypatch.chdir(directory)
        assert our_bytes(path) == pattern(0xA5)
    monkeypatch.chdir(here)  # from where QEMU takes a relative name behind "file:"
    assert qemu_bytes(image) == pattern(0xA5)


@pytest.mark.parametrize("prefix", ["", "file:"])
def test_absolute_names(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    base = make_raw(tmp_path / "elsewhere" / "base.raw")
    image = make_qed(tmp_path / "top.qed", f"{prefix}{base}", raw=True)
    assert our_bytes(image) == qemu_bytes(image) == pattern(0xA5)


def test_a_linked_image_looks_for_its_backing_file_beside_the_link(tmp_path: Path) -> None:
    for seed, directory in enumerate((tmp_path / "link", tmp_path / "real"), start=1):
        directory.mkdir()
        make_raw(directory / "base.raw", seed)
    make_qed(tmp_path / "real" / "top.qed", "base.raw", raw=True)
    link = tmp_path / "link" / "top.qed"
    link.symlink_to("../real/top.qed")
    assert our_bytes(link) == qemu_bytes(link) == pattern(1)


def test_names_in_any_bytes(tmp_path: Path) -> None:
    for name in (b"\xff\xfe.raw", "größe 中.raw".encode(), b"a\nb.raw", b"%s{}.raw"):
        make_raw(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)))
        assert our_bytes(make_qed(tmp_path / "top.qed", name, raw=True)) == pattern(0xA5)
        (tmp_path / os.fsdecode(name)).unlink()
        assert refusal(tmp_path / "top.qed").errno == errno.ENOENT


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ('json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}', "json"),
        ("nbd:unix:/tmp/socket", "nbd"),
        ("nbd://host/export", "nbd"),
        ("https://host/base.raw", "https"),
        ("rbd:pool/base", "rbd"),
        ("host_device:/dev/null", "host_device"),
        ("base.raw:1", "base.raw"),
        (":base.raw", ""),
    ],
)
def test_names_that_are_no_files(tmp_path: Path, name: str, protocol: str) -> None:
    make_raw(tmp_path / "base.raw")
    image = make_qed(tmp_path / "top.qed", name)
    message = f"{image}: refers to backing file {name}, but only files are supported, not {protocol}: names"
    error = refusal(image)
    assert str(error) == message
    assert isinstance(error, UnsupportedError)
    assert isinstance(refusal(image, BackingPolicy(root=str(tmp_path))), UnsupportedError)


def test_broken_names(tmp_path: Path) -> None:
    assert isinstance(refusal(make_qed(tmp_path / "top.qed", b"a\0b")), FormatError)
    assert "name is empty" in str(refusal(make_qed(tmp_path / "top.qed", "file:")))
    long = refusal(make_qed(tmp_path / "top.qed", "x" * 4000))
    assert long.errno == errno.ENAMETOOLONG
    assert len(str(long)) < 600


# -- missing and odd files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confined", [False, True])
def test_a_missing_backing_file(tmp_path: Path, confined: bool) -> None:
    policy = BackingPolicy(root=str(tmp_path)) if confined else None
    base, image = tmp_path / "base.raw", make_qed(tmp_path / "top.qed", "base.raw")
    error = refusal(image, policy)
    assert str(error) == f"{image}: cannot open its backing file {base}: no such file or directory"
    assert error.errno == errno.ENOENT
    base.symlink_to("nowhere")
    assert refusal(image, policy).errno == errno.ENOENT


def test_the_message_names_the_image_in_the_middle(tmp_path: Path) -> None:
    middle = make_qed(tmp_path / "middle.qed", "base.raw")
    top = make_qed(tmp_path / "top.qed", "middle.qed")
    assert str(refusal(top)) == f"{middle}: cannot open its backing file {tmp_path}/base.raw: no such file or directory"


@pytest.mark.parametrize("confined", [False, True])
@pytest.mark.parametrize("kind", ["fifo", "socket", "directory", "character device"])
def test_neither_file_nor_disk(tmp_path: Path, kind: str, confined: bool) -> None:
    odd = tmp_path / "odd"
    if kind == "fifo":
        os.mkfifo(odd)
    elif kind == "directory":
        odd.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(odd))
    else:
        odd = Path("/dev/null")
    root = "/dev" if kind == "character device" else str(tmp_path)
    image = make_qed(tmp_path / "top.qed", str(odd))
    error = refusal(image, BackingPolicy(root=root) if confined else None)
    what = "a directory" if kind == "directory" else "not a regular file"
    assert str(error) == f"{image}: cannot open its backing file {odd}: it is {what}"


def test_a_fifo_is_not_even_opened(tmp_path: Path) -> None:
    """A writer that waits for a reader must go on waiting."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    image = make_qed(tmp_path / "top.qed", "fifo")
    writer = subprocess.Popen(["dd", "if=/dev/null", f"of={fifo}", "status=none"])
    try:
        refusal(image)
        refusal(image, BackingPolicy(root=str(tmp_path)))
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(0.2)
    finally:
        writer.kill()
        writer.wait()


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    disk = make_raw(tmp_path / "disk.img")
    try:
        device = tool("losetup", "--find", "--show", "--read-only", disk).strip()
    except (AssertionError, FileNotFoundError) as error:
        pytest.skip(f"no loop device to be had: {error}")
    try:
        yield Path(device)
    finally:
        tool("losetup", "--detach", device)


@pytest.mark.guest
def test_a_block_device(tmp_path: Path, loop_device: Path) -> None:
    image = make_qed(tmp_path / "top.qed", str(loop_device))
    assert our_bytes(image) == our_bytes(loop_device) == pattern(0xA5)
    error = refusal(image, BackingPolicy(root="/"))
    assert str(error) == f"{image}: cannot open its backing file {loop_device}: it is not a regular file"


# -- policy -----------------------------------------------------------------------------------------------------------


def test_no_backing(tmp_path: Path) -> None:
    base = make_raw(tmp_path / "base.raw")
    image = make_qed(tmp_path / "top.qed", "base.raw")
    message = f"{image}: refers to backing file {base} and backing files are refused (--no-backing)"
    assert str(refusal(image, NO_BACKING)) == message
    assert our_bytes(make_qed(tmp_path / "alone.qed"), policy=NO_BACKING) == bytes(SIZE)
    assert our_bytes(base, policy=NO_BACKING) == pattern(0xA5)


def test_inside_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    base = make_raw(root / "sub" / "base.raw")
    (root / "link.raw").symlink_to("sub/base.raw")
    (tmp_path / "root-link").symlink_to("root")
    monkeypatch.chdir(tmp_path)
    for policy in (BackingPolicy(root=str(root)), BackingPolicy(root="root-link"), BackingPolicy(root="/")):
        for name in ("root/sub/base.raw", "root/link.raw", "root-link/link.raw", "root/sub/../link.raw", str(base)):
            assert our_bytes(make_qed(tmp_path / "top.qed", name), policy=policy) == pattern(0xA5)


@pytest.mark.parametrize("code", SHORTAGES, ids=os.strerror)
def test_a_walk_that_a_shortage_has_ended_has_not_left_the_root(tmp_path: Path, code: int) -> None:
    base = make_raw(tmp_path / "base.raw")
    image = make_qed(tmp_path / "top.qed", str(base))
    for failing in each_call_fails(code, least=10):
        with failing():
            try:
                file = open_backing_file(str(image), str(base), BackingPolicy(root=str(tmp_path)))
            except OSError as error:
                if error.errno != code:
                    raise
            else:
                os.close(file.fileno())


def test_outside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    make_raw(tmp_path / "base.raw")
    (tmp_path / "root2").mkdir()
    make_raw(tmp_path / "root2" / "base.raw")
    (root / "link.raw").symlink_to("../base.raw")
    (root / "directory").symlink_to("..")
    image, policy = root / "top.qed", BackingPolicy(root=str(root))
    names = ["/etc/passwd", "/etc/no-such-file", "..", "../..", "../base.raw", "../root2/base.raw", "link.raw"]
    for name in [*names, "directory/base.raw", "directory/root2/base.raw", "/proc/self/fd/0", "/dev/zero"]:
        make_qed(image, name)
        path = os.path.join(root, name)
        message = f"{image}: refers to backing file {path}, which lies outside {root} (--backing-root)"
        error = refusal(image, policy)
        assert str(error) == message
        assert isinstance(error, UnsupportedError)


def test_every_level_is_confined(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    make_raw(tmp_path / "base.raw")
    middle = make_qed(root / "middle.qed", "../base.raw")
    top = make_qed(root / "top.qed", "middle.qed")
    error = refusal(top, BackingPolicy(root=str(root)))
    assert error.path == str(middle)
    assert "lies outside" in str(error)


def test_a_path_that_changes_behind_our_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is judged after opening, too: here the path led elsewhere when it was first looked at."""
    root = tmp_path / "root"
    root.mkdir()
    make_raw(tmp_path / "base.raw")
    (root / "base.raw").symlink_to("../base.raw")
    image = make_qed(root / "top.qed", "base.raw")
    monkeypatch.setattr(os.path, "realpath", os.fspath)
    assert "lies outside" in str(refusal(image, BackingPolicy(root=str(root))))


def test_a_path_that_changes_all_the_time(tmp_path: Path) -> None:
    """A link that leads inside and outside in turns, as fast as it goes: nothing from outside is ever read."""
    root = tmp_path / "root"
    root.mkdir()
    make_raw(root / "inside.raw")
    (tmp_path / "outside.raw").write_bytes(b"secret" * 50_000)
    (root / "link").symlink_to("inside.raw")
    image, policy = make_qed(root / "top.qed", "link", raw=True), BackingPolicy(root=str(root))
    swap = "import os, sys\nwhile True:\n"
    for target in ("../outside.raw", "inside.raw"):
        swap += f"    os.symlink({target!r}, 'new'); os.rename('new', 'link')\n"
    read = refused = 0
    with subprocess.Popen([sys.executable, "-c", swap], cwd=root) as swapper:
        try:
            end = time.monotonic() + 30
            while not (read and refused) or read + refused < 200:
                assert time.monotonic() < end, (read, refused)
                try:
                    assert our_bytes(image, policy=policy) == pattern(0xA5)
                    read += 1
                except UnsupportedError as error:
                    refused += "lies outside" in str(error)
        finally:
            swapper.kill()


STARTS = ["", "", "", "./", "/", "//", "file:", "file:/", "/proc/self/root/", "/proc/self/cwd/", "/dev/fd/", "nbd:"]
PARTS = ["..", ".", "sub", "up", "top", "", "proc", "self", "root", "cwd", "fd", "0"]
NAMES = ["inside.raw", "inside.raw", "out", "fifo", "sub", "gone", "\udcff", "a\nb", "x" * 300, ""]


@given(st.sampled_from(STARTS), st.lists(st.sampled_from(PARTS), max_size=5), st.sampled_from(NAMES))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
def test_no_name_leads_out_of_the_root(tmp_path: Path, start: str, parts: list[str], name: str) -> None:
    """Whatever it is put together from: what is open is a file inside, or there is one plain line."""
    root = tmp_path / "root"
    if not root.exists():
        (root / "sub").mkdir(parents=True)
        for file in (root / "inside.raw", root / "sub" / "inside.raw", tmp_path / "inside.raw"):
            make_raw(file)
        for link, target in (("up", ".."), ("top", "/"), ("out", "../inside.raw")):
            (root / link).symlink_to(target)
        os.mkfifo(root / "fifo")
    image = str(root / "top.qed")
    try:
        path = resolve_backing(image, start + "/".join([*parts, name]))
        opened = open_backing_file(image, path, BackingPolicy(root=str(root)))
    except QedfuseError as error:
        line = describe(error)
        assert line.startswith(f"{image}: ") and line.replace("\udcff", "").isprintable()
        event("refused")
        return
    try:
        assert os.path.commonpath([os.readlink(f"/proc/self/fd/{opened.fileno()}"), root]) == str(root)
        event("opened")
    finally:
        os.close(opened.fileno())


def test_what_has_no_path_is_outside(tmp_path: Path) -> None:
    ends = os.pipe()
    try:
        image = make_qed(tmp_path / "top.qed", f"/proc/self/fd/{ends[0]}")
        assert "lies outside / (--backing-root)" in str(refusal(image, BackingPolicy(root="/")))
        assert "not a regular file" in str(refusal(image))
    finally:
        for end in ends:
            os.close(end)


@pytest.mark.parametrize("confined", [False, True])
def test_more_links_than_can_be_followed(tmp_path: Path, confined: bool) -> None:
    for number in range(2000):
        (tmp_path / f"link{number}").symlink_to(f"link{number + 1}")
    image = make_qed(tmp_path / "top.qed", "link0")
    error = refusal(image, BackingPolicy(root=str(tmp_path)) if confined else None)
    assert error.errno == errno.ELOOP and "too many levels of symbolic links" in str(error)


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C.UTF-8"},
    ],
    ids=["C", "ascii", "UTF-8"],
)
def test_names_do_not_depend_on_the_locale(tmp_path: Path, locale: dict[str, str]) -> None:
    name = "größe ∞"
    make_raw(tmp_path / name)
    image = make_qed(tmp_path / "top.qed", name, raw=True)
    for words in (("info", "--backing-chain"), ("map",), ("map", "--output=json")):
        done = qedfuse(*words, image, env=locale)
        assert (done.code, done.err) == (0, ""), done
    (tmp_path / name).unlink()
    one_line(qedfuse("map", image, env=locale), 1, "no such file")
