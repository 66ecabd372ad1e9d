"""Walking names a component at a time: where a walk gets, and that it gets there as the kernel does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qedfuse.host import walk as walk_module
from qedfuse.host.mountinfo import find_by_id, is_remote, mount_id, parse_mount
from qedfuse.host.walk import Walk
from tests.helpers.doubles.shortage import SHORTAGES, one_call_fails
from tests.helpers.judges.expect import raises_errno


def found(path: str, root: str | None = None) -> str:
    """The real path of where a walk gets."""
    with Walk(root) as walk:
        return os.readlink(f"/proc/self/fd/{walk.follow(path)}")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").touch()
    (tmp_path / "a" / "b" / "file").touch()
    for link, target in (
        ("up", ".."),
        ("self", "."),
        ("b-link", "b/"),
        ("absolute", str(tmp_path / "a")),
        ("loop", "loop"),
        ("gone", "nowhere/file"),
        ("file-link", "b/file"),
        ("slash", "file/"),
    ):
        (tmp_path / "a" / link).symlink_to(target)
    return tmp_path


def test_a_walk_that_does_not_begin_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch, raises_errno(errno.EMFILE):
        patch.setattr(walk_module, "mount_id", refuse)
        Walk(str(tmp_path))
    assert os.listdir("/proc/self/fd") == before


def test_whether_links_are_protected_is_not_guessed_for_want_of_descriptors() -> None:
    """A guess would be "yes": a link that may be followed would lead nowhere."""
    for code in SHORTAGES:
        with one_call_fails(0, code), raises_errno(code):
            walk_module._links_are_protected()
    with one_call_fails(0, errno.ENOENT):
        assert walk_module._links_are_protected()


PARTS = ["a", "b", "..", ".", "", "up", "self", "b-link", "absolute", "loop", "gone", "file", "file-link", "slash"]


@given(st.lists(st.sampled_from(PARTS), max_size=6), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=500, deadline=None)
def test_a_walk_gets_where_the_kernel_gets(tree: Path, parts: list[str], relative: bool) -> None:
    path = f"{tree}/" + "/".join(parts)
    here = os.getcwd()
    if relative:
        os.chdir(tree)
        path = "/".join(["a", *parts])
    try:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            with raises_errno(error.errno or 0):
                found(path)
            return
        try:
            expected = os.readlink(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        assert found(path) == expected
    finally:
        os.chdir(here)


def test_no_descriptor_is_left(tree: Path) -> None:
    find_by_id(0)
    before = os.listdir("/proc/self/fd")
    for path in ("a/b/file", "a/absolute/up/a/file-link", "a/loop", "a/gone", "a/file/x"):
        for root in (None, str(tree)):
            with Walk(root) as walk:
                try:
                    walk.follow(f"{tree}/{path}")
                except OSError:
                    continue
    assert os.listdir("/proc/self/fd") == before


def test_walks_are_bounded(tmp_path: Path) -> None:
    with raises_errno(errno.ENAMETOOLONG):
        found(f"{tmp_path}/" + "y" * 300)
    (tmp_path / "d").mkdir()
    down = tmp_path / "d"
    for _ in range(300):
        down = down / "d"
        down.mkdir()
    with raises_errno(errno.ENAMETOOLONG):
        found(str(down))
    (tmp_path / "again").symlink_to("./" * 1000 + "again2")
    (tmp_path / "again2").symlink_to("./" * 1000 + "d")
    found(str(tmp_path / "again"))
    (tmp_path / "many").symlink_to("d/../" * 800 + "d")
    with raises_errno(errno.ELOOP):
        found(f"{tmp_path}/" + "many/../" * 12 + "d")


def test_the_way_back_is_the_way_it_came(tmp_path: Path) -> None:
    """A directory that is moved out of the root while a walk is in it does not lead out."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret").touch()
    with Walk(str(root)) as walk:
        walk.follow(f"{root}/sub")
        (root / "sub").rename(tmp_path / "sub")
        with raises_errno(errno.ENOENT):
            walk.follow("../secret")
        assert walk.inside


def test_where_a_confined_walk_is(tree: Path) -> None:
    with Walk(str(tree / "a")) as walk:
        for path, inside in (("", False), ("/a", True), ("/a/b", True), ("/a/up", False), ("/a/up/a/b/../file", True)):
            walk.follow(f"{tree}{path}")
            assert walk.inside == inside
        walk.follow("/proc/self/root")
        assert not walk.inside
    with Walk("/") as walk:
        walk.follow(str(tree))
        assert walk.inside


@pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")
def test_links_of_others_in_a_shared_directory_are_not_followed(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (tmp_path / "file").touch()
    for name, owner in (("mine", 0), ("theirs", 1234)):
        (shared / name).symlink_to("../file")
        os.lchown(shared / name, owner, owner)
    assert found(str(shared / "mine")) == str(tmp_path / "file")
    if Path("/proc/sys/fs/protected_symlinks").read_text().strip() == "1":
        with raises_errno(errno.EACCES):
            os.open(shared / "theirs", os.O_RDONLY)
        with raises_errno(errno.EACCES):
            found(str(shared / "theirs"))
    shared.chmod(0o777)
    assert found(str(shared / "theirs")) == str(tmp_path / "file")


def test_links_of_proc_lead_where_they_lead(tmp_path: Path) -> None:
    """Not to what they say."""
    file = tmp_path / "file"
    file.touch()
    fd = os.open(file, os.O_RDONLY)
    try:
        assert found(f"/proc/self/fd/{fd}") == found(f"/dev/fd/{fd}") == str(file)
        file.unlink()
        assert found(f"/proc/self/fd/{fd}") == f"{file} (deleted)"
        assert found(f"/proc/self/cwd/../{'../' * 20}") == "/"
        with raises_errno(errno.ENOTDIR):
            found(f"/proc/self/fd/{fd}/x")
    finally:
        os.close(fd)


def test_a_branch(tree: Path) -> None:
    with Walk() as walk:
        walk.start(str(tree / "a"))
        with walk.branch() as branch:
            branch.follow("absolute/b")
            branch.follow("../..")
            assert os.readlink(f"/proc/self/fd/{branch.fd}") == str(tree)
        assert os.readlink(f"/proc/self/fd/{walk.fd}") == str(tree / "a")


def test_mounts() -> None:
    fd = os.open("/proc", os.O_PATH)
    try:
        mount = find_by_id(mount_id(fd))
    finally:
        os.close(fd)
    assert mount is not None
    assert (mount.mountpoint, mount.fstype) == ("/proc", "proc")
    assert find_by_id(-1) is None


@pytest.mark.parametrize(
    ("fstype", "remote"),
    [("ext4", False), ("tmpfs", False), ("nfs4", True), ("fuse", True), ("fuse.sshfs", True), ("fusectl", False)],
)
def test_remote_file_systems(fstype: str, remote: bool) -> None:
    assert is_remote(parse_mount(f"1 2 0:3 / /mnt rw - {fstype} x rw".encode())) == remote
