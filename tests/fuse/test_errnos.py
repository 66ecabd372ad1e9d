"""From exceptions to errnos."""

from __future__ import annotations

import errno

import pytest

from qedfuse.errors import CorruptError, InUseError
from qedfuse.fuse.errnos import cause_of, errno_of

FULL = OSError(errno.ENOSPC, "full")
BUG = ZeroDivisionError("bug")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (FULL, FULL),
        (BUG, BUG),
        (ExceptionGroup("", [FULL, OSError(errno.EIO, "io")]), FULL),
        (ExceptionGroup("", [FULL, ExceptionGroup("", [OSError(errno.EIO, "io"), BUG])]), BUG),
    ],
)
def test_a_bug_counts_before_what_came_first(error: Exception, cause: Exception) -> None:
    assert cause_of(error) is cause
    assert errno_of(error) == (errno.ENOSPC if cause is FULL else errno.EIO)


def test_what_is_broken_is_an_io_error() -> None:
    assert errno_of(CorruptError("x", "bad table")) == errno.EIO
    assert errno_of(InUseError("x", "taken"), broken=True) == errno.EBUSY
    assert errno_of(FULL, broken=True) == errno.ENOSPC
    assert errno_of(OSError("without a number")) == errno.EIO
