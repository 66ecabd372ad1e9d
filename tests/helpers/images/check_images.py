"""Small QED images with crafted faults, a plain reader and a plain check of them.

The reader and the check are written for clarity from the format's rules, not from the code under test.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from qedfuse.qed.header import HEADER_BYTES, Header

CLUSTER = 4096
TABLE = 2
ENTRIES = TABLE * CLUSTER // 8
COVERAGE = ENTRIES * CLUSTER


class Builder:
    """An image with a header cluster, an L1 table, and what is added; every cluster holds data.

    Offsets are bytes. `data` gives each cluster a content of its own.
    """

    def __init__(self, image_size: int = 3 * COVERAGE, *, features: int = 0, header_size: int = 1) -> None:
        self.header = Header(
            CLUSTER, TABLE, header_size, features, 0, 0, header_size * CLUSTER, image_size // 512 * 512
        )
        self.raw = bytearray(self.header.encode().ljust(header_size * CLUSTER, b"\0"))
        self.take(TABLE)

    @property
    def l1(self) -> int:
        return self.header.l1_table_offset

    def take(self, clusters: int = 1, fill: bytes = b"\0") -> int:
        offset = len(self.raw)
        self.raw += fill * (clusters * CLUSTER // len(fill))
        return offset

    def junk(self, clusters: int = 1) -> int:
        """Clusters that hold data and that nothing refers to."""
        return self.take(clusters, b"JUNK")

    def table(self, index: int) -> int:
        """A new L2 table for L1 entry `index`."""
        offset = self.take(TABLE)
        self.set_l1(index, offset)
        return offset

    def data(self, table: int, *entries: int) -> list[int]:
        """New data clusters for entries of an L2 table."""
        offsets = []
        for entry in entries:
            offset = len(self.raw)
            self.take(1, struct.pack("<Q", offset) + b"data" * (CLUSTER // 4 - 2))
            self.set_l2(table, entry, offset)
            offsets.append(offset)
        return offsets

    def set_l1(self, index: int, value: int) -> None:
        struct.pack_into("<Q", self.raw, self.l1 + 8 * index, value)

    def set_l2(self, table: int, entry: int, value: int) -> None:
        struct.pack_into("<Q", self.raw, table + 8 * entry, value)

    def save(self, path: Path) -> Path:
        path.write_bytes(self.raw)
        return path


def sound() -> tuple[Builder, list[int], list[list[int]]]:
    """An image without faults: its tables, and the data clusters of each."""
    image = Builder()
    tables, data = [], []
    for index in range(3):
        tables.append(image.table(index))
        data.append(image.data(tables[-1], *range(index, 40), 600, 700 + index))
    image.set_l2(tables[1], 900, 1)
    return image, tables, data


def header_of(raw: bytes | bytearray) -> Header:
    return Header.decode(bytes(raw[:HEADER_BYTES]), "image")


def _entries(raw: bytes | bytearray, offset: int, number: int) -> tuple[int, ...]:
    return struct.unpack(f"<{number}Q", raw[offset : offset + 8 * number].ljust(8 * number, b"\0"))


def sectors(raw: bytes | bytearray) -> int:
    """The file's length as QEMU counts it."""
    return -(-len(raw) // 512) * 512


def _valid(header: Header, raw: bytes | bytearray, offset: int, clusters: int) -> bool:
    end = sectors(raw) // header.cluster_size * header.cluster_size
    inside = header.header_bytes <= offset and offset + clusters * header.cluster_size <= end
    return offset % header.cluster_size == 0 and inside


def mapping(raw: bytes | bytearray) -> dict[int, int | None]:
    """Where each guest cluster inside the image is; None: its entry, or the L1 entry above it, is invalid."""
    header = header_of(raw)
    geometry = header.geometry
    number = geometry.table_entries
    clusters = geometry.clusters_for(header.image_size)
    result: dict[int, int | None] = {}
    for index, table in enumerate(_entries(raw, header.l1_table_offset, number)):
        guest = range(index * number, min((index + 1) * number, clusters))
        if table and not _valid(header, raw, table, header.table_size):
            result.update(dict.fromkeys(guest))
        elif table:
            for cluster, entry in zip(guest, _entries(raw, table, number), strict=False):
                if entry > 1:
                    result[cluster] = entry if _valid(header, raw, entry, 1) else None
    return result


def contents(raw: bytes | bytearray) -> dict[int, bytes | None]:
    """What each guest cluster reads as that is not zeroes; None: an error."""
    found: dict[int, bytes | None] = {}
    size = header_of(raw).cluster_size
    for cluster, offset in mapping(raw).items():
        content = None if offset is None else bytes(raw[offset : offset + size]).ljust(size, b"\0")
        if content is None or any(content):
            found[cluster] = content
    return found


def readable(found: dict[int, bytes | None]) -> dict[int, bytes]:
    return {cluster: content for cluster, content in found.items() if content is not None}


def table_clusters(raw: bytes | bytearray) -> set[int]:
    """The file's clusters that are part of some table."""
    header = header_of(raw)
    starts = [header.l1_table_offset, *_entries(raw, header.l1_table_offset, header.geometry.table_entries)]
    valid = [start for start in starts if _valid(header, raw, start, header.table_size)]
    return {start // header.cluster_size + number for start in valid for number in range(header.table_size)}


@dataclass
class Counts:
    corruptions: int = 0
    unreferenced: int = 0
    allocated: int = 0
    fragmented: int = 0


def count(raw: bytes | bytearray) -> Counts:
    """What qemu-img check counts (without its fault in numbering clusters), entry by entry."""
    header, counts = header_of(raw), Counts()
    size, number = header.cluster_size, header.geometry.table_entries
    used: set[int] = set()

    def mark(offset: int, clusters: int) -> int:
        span = set(range(offset // size, offset // size + clusters))
        again = len(span & used)
        used.update(span)
        counts.corruptions += again
        return again

    mark(header.l1_table_offset, header.table_size)
    for table in filter(None, _entries(raw, header.l1_table_offset, number)):
        if not _valid(header, raw, table, header.table_size):
            counts.corruptions += 1
        elif not mark(table, header.table_size):
            last = 0
            for entry in _entries(raw, table, number):
                if entry > 1:
                    counts.allocated += 1
                    counts.fragmented += last not in (0, entry - size)
                    last = entry
                    if _valid(header, raw, entry, 1):
                        mark(entry, 1)
                    else:
                        counts.corruptions += 1
    counts.unreferenced = len(set(range(header.header_size, sectors(raw) // size)) - used)
    return counts
