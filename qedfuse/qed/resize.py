"""How an image gets another size. The caller has locked the whole image.

What may happen in which order is decided in `commit.py`; what is left of the file's tail is `tail.py`'s business.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

from qedfuse.errors import QedfuseError
from qedfuse.host.storage import Storage
from qedfuse.host.waiting import Breather
from qedfuse.qed.cluster_writer import ClusterWriter
from qedfuse.qed.commit import Committer
from qedfuse.qed.tables import Tables
from qedfuse.qed.tail import CutOff
from qedfuse.sizes import SECTOR_SIZE, GuestOffset, HostOffset, round_up


class Resizer:
    """Of one image that is open for writing. Sizes are bytes. Everything raises OSError; cancelled, the image has its
    old size or the new one, and is consistent.

    `begin_change` comes before each change: there may be too many dirty pages.
    """

    def __init__(
        self,
        storage: Storage,
        tables: Tables,
        committer: Committer,
        begin_change: Callable[[], Awaitable[ClusterWriter]],
    ) -> None:
        self._storage = storage
        self._tables = tables
        self._committer = committer
        self._begin_change = begin_change

    async def grow(self, size: GuestOffset) -> None:
        """To `size`, a multiple of 512. EFBIG: the geometry cannot map so much.

        Behind the old end the tables and the backing file may hold anything: make it read as zeroes first."""
        geometry, old = self._tables.geometry, self._committer.size
        if size > geometry.max_image_size:
            message = f"file too large: this geometry maps at most {geometry.max_image_size} bytes"
            raise QedfuseError(self._storage.path, message, errno.EFBIG)
        clusters = await self._begin_change()
        await clusters.clear_tail(old, growing=True)
        offset = round_up(old, geometry.cluster_size)
        breathe = Breather()
        while offset < size:
            clusters = await self._begin_change()
            offset += await clusters.zero(offset, size - offset, size)
            await breathe()
        self._committer.grow(size)

    async def shrink(self, end: GuestOffset) -> None:
        """To `end`, rounded up to 512.

        The header first: a crash must not leave a large image that has lost its end. Then all behind `end` goes, first
        the rest of its sector, which stays inside the image, and of its cluster. What may lack space comes before all
        that: no error must leave an image that is smaller but for that."""
        clusters = await self._begin_change()
        committer = self._committer
        old, size = committer.size, round_up(end, SECTOR_SIZE)
        if end < size:
            await clusters.own(end, old)
        if size < old:
            await committer.shrink(size)
        clusters = await self._begin_change()
        if end < size:
            await clusters.zero(end, size - end, size)
        await clusters.clear_tail(size, growing=False)
        if size < old:
            await self._give_up_tail()

    async def _give_up_tail(self) -> None:
        """What is cut off takes no space any more, and cannot come back."""
        header = self._committer.header
        cut_off = CutOff(self._storage, header, self._tables, self._begin_change)
        tail = HostOffset(header.header_bytes) if self._storage.fixed else await cut_off.find_tail()
        if tail < self._tables.ends.end:
            await cut_off.forget(tail)
            await self._committer.give_up_tail(tail)
        await cut_off.punch()
