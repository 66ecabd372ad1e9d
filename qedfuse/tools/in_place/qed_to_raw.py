"""From a QED image back to a raw disk: clusters that lie where the guest has them stay, and so they all do in an image
that was made in place (`raw_to_qed.py`), however much has been written to it since.

What lies elsewhere, because the image has grown or was made in another way, is moved first (`coming_home.py`). Then
nothing but data lies where the disk is going to be, and the rest of it, which the guest sees as zeroes, is punched.
Guest cluster 0 goes to the header's place: its first sector is the switch, the rest of it goes there before, as a
header without a backing file has nothing but its first 64 bytes. At last the file is cut to the disk's size.
"""

from __future__ import annotations

import errno

from qedfuse.chain.unfinished import Unfinished, changed_meanwhile
from qedfuse.check.check import check_image
from qedfuse.errors import CorruptError, QedfuseError, UnsupportedError
from qedfuse.host.storage import Storage, fill, read
from qedfuse.host.waiting import Breather
from qedfuse.progress import Report
from qedfuse.qed.geometry import ZERO_CLUSTER
from qedfuse.qed.header import Header
from qedfuse.qed.header_io import read_header
from qedfuse.sizes import SECTOR_SIZE
from qedfuse.tools.in_place.coming_home import ComingHome, has_data
from qedfuse.tools.in_place.homes import Homes, Survey, end_in_use, survey
from qedfuse.tools.in_place.plan import Wanted
from qedfuse.tools.in_place.rehearsal import is_unused

#: Bytes that are copied at once.
_PIECE = 1 << 20


class QedToRaw:
    """See `plan.Converter`."""

    async def plan(self, storage: Storage, wanted: Wanted, progress: Report) -> QedToRawConversion:
        header = await read_header(storage)
        _refuse(header, storage.path)
        homes = Homes(storage, header)
        found = await survey(homes, progress)
        moves = None
        if found.moves_needed:
            result = await check_image(storage, header, progress=progress)
            if result.corruptions or result.check_errors:
                raise CorruptError(storage.path, "its tables are corrupt; see `qedfuse check -r all`")
            moves = ComingHome(homes, found)
            moves.refuse_too_much()
        return QedToRawConversion(storage.size(), header.image_size, homes, found, moves)

    async def resume(self, storage: Storage, unfinished: Unfinished) -> QedToRawConversion:
        """The first sector of a raw disk is often all zeroes, and tells nothing."""
        size = Header.decode(unfinished.old_first, storage.path).image_size
        first = await read(storage, 0, SECTOR_SIZE)
        if first != unfinished.new_first or storage.size() not in (unfinished.grown_size, size):
            raise changed_meanwhile(unfinished, storage.path)
        return QedToRawConversion(unfinished.old_size, size)

    async def is_unused(self, storage: Storage, unfinished: Unfinished) -> bool:
        return await is_unused(storage, unfinished, unfinished.grown_size, self, Wanted())

    async def old_end(self, storage: Storage, unfinished: Unfinished) -> int:
        homes = Homes(storage, await read_header(storage))
        return max(unfinished.old_size, await end_in_use(homes))


def _refuse(header: Header, path: str) -> None:
    if header.has_backing_file:
        message = "has a backing file, whose data a raw disk would lack; use `qedfuse convert -O raw"
        raise UnsupportedError(path, f"{message} {path} TARGET`")
    if header.needs_check:
        raise CorruptError(path, f"was not closed cleanly; first run `qedfuse check -r all {path}`")
    if header.image_size == 0:
        raise QedfuseError(path, "is an image of a disk of 0 bytes: there is nothing to convert", errno.EINVAL)
    if header.header_size > 1:
        message = f"has a header of {header.header_size} clusters, where a raw disk has data"
        raise UnsupportedError(path, f"{message}; use `qedfuse convert -O raw {path} TARGET`")


class QedToRawConversion:
    """See `plan.Conversion`. `homes` and `found` are of the tables as they are; without them, only `finish` is called.
    `moves`: what has to come first, if anything."""

    new_bytes = 0

    def __init__(
        self,
        old_size: int,
        size: int,
        homes: Homes | None = None,
        found: Survey | None = None,
        moves: ComingHome | None = None,
    ) -> None:
        self.old_size = old_size
        self._size = size
        self._homes = homes
        self._found = found
        self._moves = moves
        self._before: list[tuple[int, bytes]] | None = None
        self._leaks_cleared = False

    @property
    def altered(self) -> bool:
        return self._leaks_cleared or (self._moves is not None and self._moves.begun)

    async def write_tail(self, storage: Storage, progress: Report) -> bytes:
        homes, found = self._homes, self._found
        assert homes is not None and found is not None
        if self._moves is not None:
            await self._moves.run(progress)
            homes = self._moves.homes
            found = await survey(homes, progress)
            assert not found.moves_needed, "a cluster has not come home"
        if storage.size() < self._size:
            await storage.truncate(self._size)

        async def clear(start: int, end: int) -> None:
            self._leaks_cleared |= has_data(storage, start, end)
            await _clear(storage, start, end, homes.breathe)

        await homes.each_empty_run(clear)
        end = min(homes.header.cluster_size, self._size)
        self._before = await _pieces(storage, SECTOR_SIZE, end)
        if found.first <= ZERO_CLUSTER:
            await _clear(storage, SECTOR_SIZE, end, homes.breathe)
            return bytes(SECTOR_SIZE)
        for start in range(0, end, _PIECE):
            await homes.breathe()
            first = max(start, SECTOR_SIZE)
            piece = bytearray(min(start + _PIECE, end) - first)
            with memoryview(piece) as target:
                await fill(storage, found.first + first, target)
            if piece.count(0) < len(piece):
                await storage.write(first, [piece])
            else:
                await _clear(storage, first, first + len(piece), homes.breathe)
        return await read(storage, found.first, SECTOR_SIZE)

    async def restore(self, storage: Storage) -> None:
        if self._moves is not None:
            await self._moves.give_back()
        if self._homes is not None and self._before is not None:
            await _clear(storage, SECTOR_SIZE, self._homes.header.cluster_size, self._homes.breathe)
            for offset, piece in self._before:
                await storage.write(offset, [piece])

    async def finish(self, storage: Storage, progress: Report) -> None:
        if storage.size() > self._size:
            await storage.truncate(self._size)


async def _clear(storage: Storage, start: int, end: int, breathe: Breather) -> None:
    """Make a range read as zeroes, as far as it is inside the file."""
    while (data := storage.next_data(start)) is not None and data < end:
        await breathe()
        start = min(storage.next_hole(data), end)
        await storage.punch(data, start - data)


async def _pieces(storage: Storage, start: int, end: int) -> list[tuple[int, bytes]]:
    """What is not zero in a range that hardly holds anything: where, and what."""
    found: list[tuple[int, bytes]] = []
    while (data := storage.next_data(start)) is not None and data < end:
        start = min(storage.next_hole(data), data + _PIECE, end)
        piece = await read(storage, data, start - data)
        if piece.count(0) < len(piece):
            found.append((data, piece))
    return found
