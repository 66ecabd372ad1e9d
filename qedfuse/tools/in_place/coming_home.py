"""Moving what lies elsewhere in a QED image to where a raw disk has it, by steps that QED itself allows.

Each pass over the tables moves a batch (`relocation.py`), of which every target is free before:

- a table that is where a home is goes behind the end;
- a cluster whose home is free goes home;
- one whose home is not free, and which is itself where a home is, goes behind the end: it may be what another one
  waits for. So does guest cluster 0, whose home is the header's place, and one past the image's end.

After the first pass, or the last of several if there is more than a batch, no home is taken by anything but its own
cluster, and the next one brings the rest home. "Behind the end" is behind the last home and behind all that is in use.

At most this is copied: each cluster twice, each table once. The room is reserved before: behind the end, and at homes
that are free.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from qedfuse.check.compaction import Moves
from qedfuse.check.relocation import PIECE, Relocation
from qedfuse.errors import QedfuseError
from qedfuse.host.storage import Storage, held_bytes
from qedfuse.progress import Report
from qedfuse.qed.cluster_map import ClusterMap, read_used
from qedfuse.qed.header import Header
from qedfuse.qed.header_io import write_header
from qedfuse.tools.in_place.homes import Homes, Survey

#: Clusters that move in one pass, at most.
BATCH_CLUSTERS = 1 << 17
#: So many bytes may be copied, or an eighth of what the file holds if that is more: a copy of the image is quicker, and
#: safer, then.
MIN_LIMIT = 1 << 30


class ComingHome:
    """The moves within one image. `homes` is replaced when the L1 table has moved. `begun`: a table may have changed,
    or data that nothing refers to.

    All calls raise OSError. Failed or cancelled, they have done a part, and the image reads as before.
    """

    def __init__(self, homes: Homes, survey: Survey) -> None:
        self.homes = homes
        self.begun = False
        self._astray = survey.astray
        tables = sum(offset < homes.end for offset in survey.tables)
        self._behind = ((survey.in_the_way - tables) << homes.bits) + tables * homes.header.geometry.table_bytes
        self._bytes = self._behind + (survey.astray << homes.bits)

    def refuse_too_much(self) -> None:
        """Raise QedfuseError if it is not worth it."""
        storage = self.homes.storage
        limit = max(MIN_LIMIT, held_bytes(storage) // 8)
        if self._bytes > limit:
            raise QedfuseError(
                storage.path,
                f"{self._astray} of its clusters lie elsewhere than in a raw disk: {self._bytes >> 20} MiB would have "
                f"to be moved, and at most {limit >> 20} MiB are; use `qedfuse convert {storage.path} TARGET`",
                errno.EFBIG,
            )

    async def run(self, progress: Report) -> None:
        """Carry it out. `progress(done, total)` counts clusters."""
        storage = self.homes.storage
        used = await read_used(storage, self.homes.bounds, self.homes.breathe)
        behind = max(used.end_of_marked() << self.homes.bits, self.homes.end)
        self.begun |= has_data(storage, behind, behind + self._behind)
        await storage.reserve(behind, self._behind)
        if storage.size() < behind:
            await storage.truncate(behind)
        await self._each_free_home(used, self._reserve)
        relocation = Relocation(storage, await self._known_header())
        done = 0
        while moves := await self._plan(used):
            total = done + max(len(moves.sources), self._bytes >> self.homes.bits)
            for source, target, number in moves.runs(max(1, PIECE >> self.homes.bits)):
                await relocation.copy_run(source, target, number)
                done += number
                progress(done, total)
            for source, target in moves.tables.items():
                await relocation.copy_run(source, target, self.homes.header.table_size)
            await storage.sync()
            self.begun = True
            used, _ = await relocation.relink(moves)
            await storage.sync()
            self.homes = Homes(storage, relocation.header)

    async def _known_header(self) -> Header:
        """The header without autoclear bits that we do not know: what they vouch for is about to change."""
        header = self.homes.header
        if header != header.with_known_autoclear():
            self.begun = True
            header = header.with_known_autoclear()
            await write_header(self.homes.storage, header)
        return header

    async def _reserve(self, offset: int, size: int) -> None:
        self.begun |= has_data(self.homes.storage, offset, offset + size)
        await self.homes.storage.reserve(offset, size)

    async def give_back(self) -> None:
        """What has been reserved, if nothing has been `begun`."""
        homes = self.homes
        used = await read_used(homes.storage, homes.bounds, homes.breathe)
        with suppress(OSError):
            await self._each_free_home(used, partial(_punch_inside, homes.storage))

    async def _each_free_home(self, used: ClusterMap, visit: Callable[[int, int], Awaitable[None]]) -> None:
        """Call `visit(offset, size)` for the free homes of clusters that are elsewhere, neighbours together."""
        homes = self.homes
        start = end = 0
        async for first, chunk in homes.entries():
            for guest, _ in homes.astray(first, chunk):
                if 0 < guest < homes.clusters and not _is_used(used, guest):
                    if guest != end:
                        await _visit_run(visit, start << homes.bits, end << homes.bits)
                        start = guest
                    end = guest + 1
        await _visit_run(visit, start << homes.bits, end << homes.bits)

    async def _plan(self, used: ClusterMap) -> Moves:
        """The next batch."""
        homes = self.homes
        table_size = homes.header.table_size
        behind = max(used.end_of_marked(), homes.clusters)
        moves = Moves()
        for offset in await homes.tables():
            if offset < homes.end and len(moves.tables) * table_size < BATCH_CLUSTERS:
                moves.tables[offset >> homes.bits] = behind
                behind += table_size
        pairs: list[tuple[int, int]] = []
        async for first, chunk in homes.entries():
            for guest, offset in homes.astray(first, chunk):
                if 0 < guest < homes.clusters and not _is_used(used, guest):
                    pairs.append((offset >> homes.bits, guest))
                elif offset < homes.end:
                    pairs.append((offset >> homes.bits, behind))
                    behind += 1
                if len(pairs) == BATCH_CLUSTERS:
                    break
            if len(pairs) == BATCH_CLUSTERS:
                break
        for source, target in sorted(pairs):
            moves.sources.append(source)
            moves.targets.append(target)
        return moves


def _is_used(used: ClusterMap, cluster: int) -> bool:
    return cluster < used.clusters and used.next_marked(cluster) == cluster


def has_data(storage: Storage, start: int, end: int) -> bool:
    """Whether the host has data anywhere in a range of the file."""
    data = storage.next_data(start)
    return data is not None and data < end


async def _visit_run(visit: Callable[[int, int], Awaitable[None]], start: int, end: int) -> None:
    if start < end:
        await visit(start, end - start)


async def _punch_inside(storage: Storage, offset: int, size: int) -> None:
    """As far as it is inside the file, which may not have grown so far."""
    size = min(size, storage.size() - offset)
    if size > 0:
        await storage.punch(offset, size)
