"""The `qedfuse` command, whose daemon does writes only when four have met: each waits for the others to come.

`python -m` this module and arguments. It is for writes that Python does; those that C does wait for nobody.
"""

from __future__ import annotations

import errno
import os
import sys

import trio

from qedfuse.cli.main import main
from qedfuse.host.storage import Buffer
from qedfuse.qed.image import Image

MANY = 4
_PATIENCE = 10.0


class Meeting:
    def __init__(self) -> None:
        self._arrived = 0
        self._all = trio.Event()

    async def join(self) -> None:
        self._arrived += 1
        if self._arrived == MANY:
            self._all.set()
        with trio.move_on_after(_PATIENCE):
            await self._all.wait()
        if not self._all.is_set():
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


def let_writes_meet() -> None:
    write, meeting = Image.write, Meeting()

    async def meet(self: Image, offset: int, data: Buffer) -> None:
        await meeting.join()
        await write(self, offset, data)

    Image.write = meet  # type: ignore[method-assign]


if __name__ == "__main__":
    let_writes_meet()
    sys.exit(main())
