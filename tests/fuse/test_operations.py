"""The edge without a kernel: what becomes of errors, and of handles."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest
import trio
import trio.testing

from qedfuse.errors import CorruptError, InUseError, ReadOnlyError, UnsupportedError
from qedfuse.fuse.complaints import Complaints
from qedfuse.fuse.operations import Handle, Operations
from qedfuse.fuse.options import MountOptions
from qedfuse.fuse.tree import Tree
from tests.helpers.mounts.slots import slot_of

#: As much of a node as a handle looks at.
NODE = cast(Any, SimpleNamespace(id=2))


class Broken:
    """An image whose every call raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def fail(*args: object) -> None:
            raise self.error

        return fail


def operations(tmp_path: Path) -> Operations:
    return Operations(Tree(), MountOptions(), os.stat(tmp_path))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (ReadOnlyError("x", "no"), errno.EROFS),
        (CorruptError("x", "bad table"), errno.EIO),
        (ZeroDivisionError("bug"), errno.EIO),
        (KeyError(5), errno.EIO),
        (ExceptionGroup("two", [OSError(errno.EDQUOT, "quota"), OSError(errno.EIO, "io")]), errno.EDQUOT),
        (ExceptionGroup("two", [OSError(errno.EDQUOT, "quota"), ZeroDivisionError()]), errno.EIO),
        (OSError("without a number"), errno.EIO),
    ],
)
def test_errors_become_errnos(tmp_path: Path, error: Exception, code: int) -> None:
    edge = operations(tmp_path)
    edge._handles[7] = Handle(slot_of(Broken(error)), NODE)
    for call in (lambda: edge.read(7, 0, 512), lambda: edge.write(7, 0, b"x"), lambda: edge.fsync(7, True)):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            trio.run(call)
        assert caught.value.errno == code


def test_requests_for_what_is_not_there_are_errors_and_no_more(tmp_path: Path) -> None:
    edge = operations(tmp_path)
    context = cast(Any, None)
    for call in (
        lambda: edge.read(1, 0, 512),
        lambda: edge.write(1, 0, b"x"),
        lambda: edge.flush(1),
        lambda: edge.fsync(1, False),
        lambda: edge.release(1),
        lambda: edge.releasedir(1),
        lambda: edge.getattr(99, context),
        lambda: edge.open(99, os.O_RDONLY, context),
        lambda: edge.lookup(1, b"none.raw", context),
        lambda: edge.unlink(1, b"none.raw", context),
    ):
        with pytest.raises(pyfuse3.FUSEError):
            trio.run(call)
    trio.run(edge.forget, [(99, 1)])


def test_a_close_waits_for_an_image_that_is_being_replaced(tmp_path: Path) -> None:
    """And is told of the failure of the one that is there then."""
    edge = operations(tmp_path)
    old, other = Broken(ZeroDivisionError()), Broken(ZeroDivisionError())
    slot = slot_of(old)
    edge._handles[7] = Handle(slot, NODE, writes=True)

    async def nothing() -> None:
        """Nothing is to be made durable."""

    for image, failed in ((old, None), (other, OSError(errno.EIO, "an earlier sync failed"))):
        vars(image).update(failed=failed, clean=nothing, size=512, writable=True)
    caught: list[int] = []

    async def close() -> None:
        try:
            await edge.flush(7)
        except pyfuse3.FUSEError as error:
            caught.append(error.errno)

    async def main() -> None:
        async with trio.open_nursery() as nursery, slot.quiesced():
            nursery.start_soon(close)
            await trio.testing.wait_all_tasks_blocked()
            slot.replace(cast(Any, other))
            assert not caught
        assert caught == [errno.EIO]

    trio.run(main)


def test_cancellation_passes_through(tmp_path: Path) -> None:
    edge = operations(tmp_path)

    class Slow:
        def read_nowait(self, offset: int, size: int) -> None:
            return None

        async def read(self, offset: int, size: int) -> bytes:
            await trio.sleep_forever()
            raise AssertionError

    edge._handles[7] = Handle(slot_of(Slow()), NODE)

    async def main() -> None:
        with trio.move_on_after(0.01) as scope:
            await edge.read(7, 0, 512)
        assert scope.cancelled_caught

    trio.run(main)


def test_extended_attributes_stay_unimplemented(tmp_path: Path) -> None:
    """An implementation costs an upcall for each write."""
    for name in ("getxattr", "listxattr", "setxattr", "removexattr"):
        assert name not in Operations.__dict__


@pytest.mark.parametrize(
    ("error", "broken", "plain"),
    [
        (UnsupportedError("x", "feature"), errno.EIO, errno.ENOTSUP),
        (InUseError("x", "taken"), errno.EBUSY, errno.EBUSY),
        (PermissionError(errno.EACCES, "no"), errno.EACCES, errno.EACCES),
    ],
)
def test_a_broken_image_is_an_io_error(error: Exception, broken: int, plain: int) -> None:
    assert Complaints().errno_of(error, "open", broken=True) == broken
    assert Complaints().errno_of(error, "open") == plain


def test_a_complaint_is_not_repeated_at_once(caplog: pytest.LogCaptureFixture) -> None:
    complaints = Complaints()
    with caplog.at_level(logging.INFO, "qedfuse"):
        for number in range(1000):
            complaints.errno_of(OSError(errno.EIO, "bad", f"image{number % 2}"), "read")
            complaints.errno_of(OSError(errno.ESTALE, "gone"), "open")
    assert [record.message for record in caplog.records] == [
        "read failed: image0: input/output error",
        "read failed: image1: input/output error",
    ]


def test_a_bug_leaves_its_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qedfuse"):
        assert Complaints().errno_of(ZeroDivisionError("by hand"), "write") == errno.EIO
    (record,) = caplog.records
    assert "bug" in record.message and record.exc_info
