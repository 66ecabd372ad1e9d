"""What a block has failed with is told, whatever closing says; and what closing says if nothing else has failed."""

from __future__ import annotations

import errno
import os

import pytest
import trio

from qedfuse.host.closing import closing
from tests.helpers.judges.expect import raises_errno


class File:
    """Closing it fails with this errno, if any."""

    def __init__(self, code: int | None) -> None:
        self.closed = 0
        self._code = code

    async def close(self) -> None:
        self.closed += 1
        if self._code is not None:
            raise OSError(self._code, os.strerror(self._code))


@pytest.mark.parametrize("code", [None, errno.EIO])
def test_the_blocks_error_comes_first(code: int | None) -> None:
    file = File(code)

    async def main() -> None:
        async with closing(file) as same:
            assert same is file
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trio.run(main)
    assert file.closed == 1


def test_closing_is_heard_if_nothing_else_has_failed() -> None:
    file = File(errno.EIO)

    async def main() -> None:
        async with closing(file):
            pass

    with raises_errno(errno.EIO):
        trio.run(main)
    assert file.closed == 1
