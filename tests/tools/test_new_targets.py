"""What a command makes and cannot fill is not left behind, whatever fails; what another process uses is left to it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from qedfuse.chain import unfinished
from qedfuse.errors import InUseError
from qedfuse.host import output_file
from qedfuse.host.image_lock import lock
from qedfuse.tools.convert import convert_image
from qedfuse.tools.create import create_image
from tests.helpers.doubles.shortage import each_call_fails
from tests.helpers.judges.expect import raises_errno

MIB = 1 << 20
KINDS = ["create", "convert to raw", "convert to qed"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new"


@pytest.fixture
def make(kind: str, path: Path) -> Callable[[], None]:
    """Make it."""
    source = path.with_name("source")
    source.write_bytes(b"x" * MIB)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "create": lambda: create_image(str(path), MIB),
        "convert to raw": lambda: convert_image(str(source), str(path)),
        "convert to qed": lambda: convert_image(str(source), str(path), target_format="qed"),
    }

    async def main() -> None:
        with trio.fail_after(30):
            await calls[kind]()

    return lambda: trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_fails(make: Callable[[], None], path: Path) -> None:
    for failing in each_call_fails(errno.EMFILE, least=5):
        try:
            with failing():
                make()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            assert not path.exists()
        else:
            path.unlink()


class Locks:
    """Calls of fcntl(2) of which those that lock the file fail, the first one or all, with this errno."""

    def __init__(self, path: Path, code: int, *, all: bool) -> None:
        self._path = str(path)
        self._code = code
        self._all = all
        self._really = fcntl.fcntl
        self.failed = 0

    def __call__(self, fd: int, command: int, argument: Any) -> Any:
        ours = os.path.realpath(f"/proc/self/fd/{fd}") == self._path
        if ours and command == fcntl.F_OFD_SETLK and (self._all or not self.failed):
            self.failed += 1
            raise OSError(self._code, os.strerror(self._code))
        return self._really(fd, command, argument)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("code", "all"), [(errno.EIO, True), (errno.EAGAIN, False)], ids=["the host fails", "refused once"]
)
def test_what_cannot_be_locked(
    make: Callable[[], None], path: Path, monkeypatch: pytest.MonkeyPatch, code: int, all: bool
) -> None:
    """Refused, and then in no other hands: of two that have tried at the same time both may fail."""
    locks = Locks(path, code, all=all)
    monkeypatch.setattr(fcntl, "fcntl", locks)
    with raises_errno(errno.EBUSY if code == errno.EAGAIN else code):
        make()
    assert locks.failed
    assert not path.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_process_was_faster_to_lock(
    make: Callable[[], None], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its content is what the other one has written: it may tell of success already."""
    others: list[int] = []

    def be_slow(fd: int, name: str, *, writable: bool) -> None:
        if name == str(path):
            others.append(os.open(path, os.O_RDWR))
            lock(others[0], name, writable=True)
            os.write(others[0], b"theirs")
        lock(fd, name, writable=writable)

    monkeypatch.setattr(unfinished, "lock", be_slow)
    monkeypatch.setattr(output_file, "lock", be_slow)
    with pytest.raises(InUseError):
        make()
    assert path.read_bytes() == b"theirs"
    os.close(others[0])
