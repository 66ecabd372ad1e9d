"""A new file is gone again if what fills it fails: our own one, and no other that has its name by then."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from qedfuse.host.image_lock import lock
from qedfuse.host.new_file import NewFile


class Failed(Exception):
    pass


def fail_in(path: Path, meanwhile: Callable[[], object] = lambda: None) -> bool:
    """Fill it, and fail. Returns whether it was made."""
    with suppress(Failed), NewFile(str(path)) as new:
        meanwhile()
        raise Failed
    return new.made


def test_one_that_is_filled_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"

    async def main() -> None:
        for made in (True, False):
            with NewFile(str(path)) as new:
                assert new.made is made
                assert path.exists()
                await new.make_durable()

    trio.run(main)
    assert path.exists()


def test_one_that_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    assert not fail_in(path)
    with NewFile(str(tmp_path / "none"), make=False) as none:
        assert not none.made
    assert path.read_bytes() == b"x"
    assert os.listdir(tmp_path) == ["file"]


def test_one_that_fails_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    descriptors = os.listdir("/proc/self/fd")
    assert fail_in(path)
    assert not path.exists()
    assert os.listdir("/proc/self/fd") == descriptors
    link = tmp_path / "link"
    link.symlink_to("file")
    assert fail_in(link)
    assert not path.exists()
    assert link.is_symlink()


def test_why_it_cannot_be_made_is_said_of_the_name(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("missing/file")
    with pytest.raises(FileNotFoundError) as caught:
        NewFile(str(link))
    assert caught.value.filename == str(link)


def test_another_file_of_its_name_stays(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"

    def replaced() -> None:
        other.write_bytes(b"other")
        other.rename(path)

    def made_again() -> None:
        path.unlink()
        path.write_bytes(b"other")  # with the same number, if ours were free by now

    def linked() -> None:
        path.rename(other)
        path.symlink_to("other")

    for meanwhile in (replaced, made_again):
        assert fail_in(path, meanwhile)
        assert path.read_bytes() == b"other"
        path.unlink()
    assert fail_in(path, linked)
    assert path.is_symlink()


def test_one_that_is_gone_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert fail_in(path, path.unlink)
    assert not path.exists()


@pytest.mark.parametrize("writable", [False, True])
def test_one_that_another_process_uses_is_that_ones(tmp_path: Path, writable: bool) -> None:
    """It has found a file there, and need not look whether it stays."""
    path = tmp_path / "file"
    users: list[int] = []

    def used() -> None:
        users.append(os.open(path, os.O_RDWR))
        lock(users[0], str(path), writable=writable)

    assert fail_in(path, used)
    assert path.exists()
    os.close(users[0])


def test_one_on_a_host_that_cannot_lock_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    path = tmp_path / "file"
    assert fail_in(path)
    assert not path.exists()
