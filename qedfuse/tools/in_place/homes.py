"""Where a QED image's clusters lie, against where a raw disk has them.

The *home* of guest cluster i is host cluster i. The homes of a disk of n clusters are the host clusters 0 to n - 1, of
which 0 is the header's place: guest cluster 0 can come home only when there is no header any more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from qedfuse.errors import CorruptError
from qedfuse.host.chunks import CHUNK_SIZE, unpack_entries
from qedfuse.host.storage import Storage
from qedfuse.host.waiting import Breather
from qedfuse.progress import Report
from qedfuse.qed.geometry import ZERO_CLUSTER
from qedfuse.qed.header import Header
from qedfuse.qed.table_walk import Bounds, GuestEntries, L1Entries
from qedfuse.sizes import ENTRY_SIZE, round_up
from qedfuse.tools.in_place.home_entries import HomeEntries


class Homes:
    """The tables of one image without a backing file, while nothing writes it. Walks over them take bounded memory,
    and raise OSError, CorruptError for an L2 table outside the file."""

    def __init__(self, storage: Storage, header: Header) -> None:
        self.storage = storage
        self.header = header
        self.bounds = Bounds.of(header, storage.size())
        self.bits = header.geometry.cluster_bits
        #: How many clusters the disk has.
        self.clusters = header.geometry.clusters_for(header.image_size)
        #: Where (bytes) the last home ends.
        self.end = self.clusters << self.bits
        self.breathe = Breather()
        most = min(CHUNK_SIZE, header.geometry.table_bytes) // ENTRY_SIZE
        self._home_entries = HomeEntries(header.cluster_size, most)

    def entries(self) -> GuestEntries:
        return GuestEntries(self.storage, self.bounds, self.breathe)

    async def tables(self) -> list[int]:
        """The offsets of all tables. Raises CorruptError if there are more than the file can hold."""
        found = [self.header.l1_table_offset]
        async for _, offset in L1Entries(self.storage, self.header, self.breathe):
            found.append(offset)
            if len(found) * self.header.geometry.table_bytes > self.bounds.size:
                raise CorruptError(self.storage.path, "its tables overlap; see `qedfuse check -r all`")
        return found

    def are_home(self, first: int, chunk: bytearray) -> bool:
        """Whether a chunk of entries says that all its clusters are at home: as it is throughout in an image that was
        made in place, and quick to tell."""
        count = len(chunk) // ENTRY_SIZE
        return 0 < first <= self.clusters - count and chunk == self._home_entries.encode(first, count)

    def astray(self, first: int, chunk: bytearray) -> list[tuple[int, int]]:
        """The clusters of a chunk that are not at home, as (guest cluster, offset); that of guest cluster 0 is one."""
        if self.are_home(first, chunk):
            return []
        found = enumerate(unpack_entries(chunk), first)
        end, bits = self.clusters, self.bits
        return [
            (guest, offset)
            for guest, offset in found
            if offset > ZERO_CLUSTER and (offset != guest << bits or not 0 < guest < end)
        ]

    async def each_empty_run(self, visit: Callable[[int, int], Awaitable[None]]) -> None:
        """Call `visit(start, end)` for the homes (bytes, up to the last one's end, without cluster 0) of guest clusters
        that have none."""
        position = 1
        async for first, chunk in self.entries():
            if self.are_home(first, chunk):
                runs = [(first, first + (len(chunk) // ENTRY_SIZE))]
            else:
                allocated = (guest for guest, value in enumerate(unpack_entries(chunk), first) if value > ZERO_CLUSTER)
                runs = [(guest, guest + 1) for guest in allocated]
            for start, stop in runs:
                if position < min(start, self.clusters):
                    await visit(position << self.bits, min(start, self.clusters) << self.bits)
                position = max(position, stop)
        if position < self.clusters:
            await visit(position << self.bits, self.end)


@dataclass
class Survey:
    """What stands between an image and a raw disk. `first`: the offset of guest cluster 0, or what its entry says
    instead. `astray`: clusters that are not at home (but for guest cluster 0); `in_the_way`: clusters and tables that
    are where a home is. `moves_needed`: some of it matters."""

    first: int = 0
    astray: int = 0
    in_the_way: int = 0
    tables: list[int] = field(default_factory=list)

    @property
    def moves_needed(self) -> bool:
        return self.astray > 0 or self.in_the_way > 0


async def survey(homes: Homes, progress: Report) -> Survey:
    """Look at all tables. Where no moves are needed this is a check, too: nothing is referred to twice.

    `progress(done, total)` counts guest clusters. Raises OSError; CorruptError.
    """
    found = Survey(tables=sorted(await homes.tables()))
    found.in_the_way += sum(offset < homes.end for offset in found.tables)
    last = 0
    async for first, chunk in homes.entries():
        progress(min(first, homes.clusters), homes.clusters)
        if homes.are_home(first, chunk):
            last = max(last, first + (len(chunk) // ENTRY_SIZE) - 1)
            continue
        for guest, offset in homes.astray(first, chunk):
            if guest == 0:
                found.first = offset
            found.astray += 0 < guest < homes.clusters
            found.in_the_way += offset < homes.end
        entries = enumerate(unpack_entries(chunk), first)
        at_home = (guest for guest, value in entries if value == guest << homes.bits and guest < homes.clusters)
        last = max(last, max(at_home, default=0))
    progress(homes.clusters, homes.clusters)
    _check(homes, found, last)
    return found


def _check(homes: Homes, found: Survey, last: int) -> None:
    """The order of things as far as a walk has seen it. `last`: the last cluster that is at home."""
    size, table_bytes = homes.header.cluster_size, homes.header.geometry.table_bytes
    overlap = any(after - before < table_bytes for before, after in zip(found.tables, found.tables[1:], strict=False))
    outside = (last + 1) << homes.bits > homes.bounds.end
    if found.first > ZERO_CLUSTER:
        outside |= not homes.bounds.holds(found.first, size)
        overlap |= any(offset - size < found.first < offset + table_bytes for offset in found.tables)
    if overlap or outside:
        raise CorruptError(homes.storage.path, "its tables are corrupt; see `qedfuse check -r all`")


async def end_in_use(homes: Homes) -> int:
    """Up to where (bytes) the tables refer to anything that is inside the file, and they themselves."""
    geometry = homes.header.geometry
    end = max(await homes.tables()) + geometry.table_bytes
    async for _, chunk in homes.entries():
        end = max(end, max(unpack_entries(chunk)) + homes.header.cluster_size)
    return min(end, round_up(homes.storage.size(), 1 << homes.bits))
