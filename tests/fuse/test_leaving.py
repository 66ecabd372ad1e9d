"""How the file of an image is left that is closed: found again as it was, unless another process has changed it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_for_use
from qedfuse.fuse.leaving import LeftFile
from qedfuse.fuse.page_cache import CachedPages
from qedfuse.host.file_id import FileMark
from qedfuse.qed.image import Image
from qedfuse.tools.create import create_image
from tests.helpers.judges.expect import raises_errno

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qed"
    trio.run(create_image, str(path), MIB)
    return path


def with_image(
    path: Path, body: Callable[[Image, CachedPages, LeftFile], Awaitable[None]], *, read_only: bool = False
) -> None:
    async def main() -> None:
        cached = CachedPages()
        image = await open_for_use(path, read_only=read_only)
        try:
            cached.note_open(image)
            await body(image, cached, LeftFile(cached))
        finally:
            await image.close()

    trio.run(main)


async def close_and_leave(image: Image, left: LeftFile, *, local: bool = True) -> int:
    """Returns the descriptor, as it was."""
    fd = left.keep_descriptor(image, ending=False)
    assert fd is not None
    await image.close()
    await left.leave(fd, image.path, local=local, ending=trio.Event())
    return fd


@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
@pytest.mark.parametrize("mtime_ns", [None, 10**18], ids=["as it is", "set"])
def test_the_state_it_is_left_in_is_known_again(path: Path, local: bool, mtime_ns: int | None) -> None:
    async def body(image: Image, cached: CachedPages, left: LeftFile) -> None:
        await image.write(0, b"x" * 512)
        left.mtime_ns = mtime_ns
        fd = await close_and_leave(image, left, local=local)
        with raises_errno(errno.EBADF):
            os.fstat(fd)
        assert left.mark == FileMark.of(os.stat(path)) and left.left_at > 0
        assert mtime_ns in (None, os.stat(path).st_mtime_ns)
        again = await open_for_use(path, read_only=True)
        try:
            cached.note_open(again)
            assert cached.may_keep(again) and cached.is_current(again)
        finally:
            await again.close()

    with_image(path, body)


def test_it_does_not_always_matter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def writable(image: Image, _cached: CachedPages, left: LeftFile) -> None:
        assert left.keep_descriptor(image, ending=True) is None
        left.mtime_ns = 5
        fd = left.keep_descriptor(image, ending=True)
        assert fd is not None
        os.close(fd)

        def no_more(_fd: int) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(os, "dup", no_more)
        assert left.keep_descriptor(image, ending=False) is None, "there is none left"

    async def read_only(image: Image, _cached: CachedPages, left: LeftFile) -> None:
        assert left.keep_descriptor(image, ending=False) is None

    with_image(path, read_only, read_only=True)
    with_image(path, writable)


def test_what_fails_is_told_and_the_file_counts_as_changed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(image: Image, cached: CachedPages, left: LeftFile) -> None:
        fd = left.keep_descriptor(image, ending=False)
        assert fd is not None
        os.close(fd)
        with caplog.at_level(logging.WARNING, "qedfuse"):
            await left.leave(fd, image.path, local=True, ending=trio.Event())
        assert left.mark is None
        assert caplog.messages == [f"{path}: bad file descriptor"]

    with_image(path, body)
