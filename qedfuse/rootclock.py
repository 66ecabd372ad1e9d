"""The time of change of a file mount's root, which the kernel neither keeps nor asks for; see `outside.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable

from qedfuse.errors import describe
from qedfuse.image import Image
from qedfuse.outside import Outside

_log = logging.getLogger("qedfuse")


class RootClock:
    """Tells the kernel when the root was last written, as often as somebody who may have written closes it.

    Only then, since the mount is in use then anyway: at any other time a look from outside could come in the way of
    who unmounts. `count` says how many writes there have been: the image file itself changes at other times, too.
    """

    def __init__(self, outside: Outside, count: Callable[[], int]) -> None:
        self._outside = outside
        self._count = count
        self._told = 0

    async def start(self, image: Image) -> None:
        """Tell size and times for the first time. Raises QedfuseError."""
        status = image.storage.stat()
        await self._outside.settle(image.size, (status.st_atime_ns, status.st_mtime_ns))

    async def update(self, image: Image) -> None:
        """Somebody closes the root."""
        count = self._count()
        if count == self._told:
            return
        told, self._told = self._told, count
        status = image.storage.stat()
        try:
            if not await self._outside.set_times((status.st_atime_ns, status.st_mtime_ns)):
                self._told = told  # the next one to close it tries again
        except OSError as error:
            _log.warning("%s", describe(error, image.path))
