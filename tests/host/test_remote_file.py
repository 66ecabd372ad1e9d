"""A file behind which there is another process or machine: what fails leaves it as it was, and nothing open."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio

from qedfuse.host.file_storage import FileStorage
from qedfuse.host.mountinfo import mount_id
from qedfuse.host.remote_file import RemoteFile
from tests.helpers.judges.expect import raises_errno


def eio() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


def descriptors(path: Path) -> int:
    """How many this process has of the file."""
    return sum(os.path.realpath(fd) == str(path) for fd in Path("/proc/self/fd").iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 512)
    return path


def remote(path: Path, *, writable: bool = False) -> RemoteFile:
    file = FileStorage.open(path, writable)
    return RemoteFile(file.path, file.fileno(), writable, mount_id(file.fileno()))


@pytest.mark.parametrize("question", ["stat", "size"])
def test_what_cannot_be_become_changes_nothing(path: Path, question: str) -> None:
    class Failing(FileStorage):
        def stat(self) -> os.stat_result:
            if question == "stat":
                raise eio()
            return super().stat()

        def size(self) -> int:
            raise eio()

    async def main() -> None:
        file = remote(path)
        other = Failing.open(path, True)
        before = file.fileno(), other.fileno(), file.stat(), file.size()
        with raises_errno(errno.EIO):
            file.become(other)
        assert (file.fileno(), other.fileno(), file.stat(), file.size()) == before
        assert not file.writable
        await other.close()
        await file.close()

    trio.run(main)
    assert descriptors(path) == 0


def test_it_becomes_a_file_whose_mount_is_not_to_be_seen_any_more(path: Path) -> None:
    """Such a one passes for local, and answers for itself."""

    async def main() -> None:
        file = remote(path)
        with path.open("ab") as more:
            more.write(b"y" * 512)
        file.become(FileStorage.open(path, True))
        assert file.writable
        assert file.size() == file.stat().st_size == 1024
        await file.write(0, [b"z"])
        await file.close()

    trio.run(main)
    assert path.read_bytes()[:1] == b"z"
    assert descriptors(path) == 0


def test_a_close_that_fails_leaves_no_former_descriptor(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_close = os.close

    async def main() -> None:
        file = remote(path)
        file.become(remote(path, writable=True))
        last = file.fileno()

        def close(fd: int) -> None:
            really_close(fd)
            if fd == last:
                raise eio()

        with monkeypatch.context() as patch, raises_errno(errno.EIO):
            patch.setattr(os, "close", close)
            await file.close()

    trio.run(main)
    assert descriptors(path) == 0
