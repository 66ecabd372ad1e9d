"""qcow2 L2 entries, and what they say of guest ranges. Pure: no I/O.

Source: QEMU docs/interop/qcow2, "L2 table entry", "Standard Cluster Descriptor", "Compressed Clusters Descriptor".
"""

from __future__ import annotations

import zlib
from array import array

from qedfuse.errors import CorruptError
from qedfuse.layers.qcow2.header import Qcow2Header
from qedfuse.layers.runs import NO_PLACE, Kind, Run, append_run
from qedfuse.sizes import SECTOR_SIZE, HostOffset

#: Bits of L1 and L2 entries. Reserved bits are ignored, as QEMU does.
ENTRY_OFFSET = 0x00FF_FFFF_FFFF_FE00
ENTRY_COMPRESSED = 1 << 62
ENTRY_ZERO = 1


class EntryMapper:
    """Turns L2 entries of one image into runs. `path` is for messages.

    A data cluster that the end of the file cuts reads as zeroes from there, as in QEMU, which may leave the file's last
    cluster short. One that starts past the end is an error, see `layer.py`.
    """

    def __init__(self, header: Qcow2Header, path: str) -> None:
        self._path = path
        self._has_zero_flag = header.version >= 3
        self._bits = header.cluster_bits
        self._cluster_size = header.cluster_size

    def append(
        self, runs: list[Run], entries: array[int], first: int, position: int, stop: int, file_size: int
    ) -> None:
        """Append the runs of guest bytes [position, stop), which `entries` cover.

        `first` is the guest cluster (a number, not bytes) of `entries[0]`. Raises CorruptError.
        """
        bits, cluster_size = self._bits, self._cluster_size
        index = (position >> bits) - first
        past = ((stop - 1) >> bits) - first + 1
        while index < past:
            entry = last = entries[index]
            kind = self._kind(entry, position)
            # Most neighbours continue each other: count them without making runs.
            place = self._place_of_zeroes(entry) if kind is Kind.ZERO else NO_PLACE
            step = cluster_size if kind is Kind.DATA or place else 0
            index += 1
            while index < past and entries[index] == last + step:
                last += step
                index += 1
            until = min(stop, (first + index) << bits)
            if kind is Kind.DATA:
                self._append_data(runs, entry & ENTRY_OFFSET, position, until - position, file_size)
            else:
                append_run(runs, kind, until - position, place + (position & (cluster_size - 1)) if place else NO_PLACE)
            position = until

    def _kind(self, entry: int, position: int) -> Kind:
        if entry & ENTRY_COMPRESSED:
            return Kind.INDIRECT
        if entry & ENTRY_ZERO:
            if not self._has_zero_flag:
                raise CorruptError(self._path, f"the l2 entry of guest offset {position} has a flag of version 3")
            return Kind.ZERO
        return Kind.DATA if entry & ENTRY_OFFSET else Kind.UNALLOCATED

    def _place_of_zeroes(self, entry: int) -> HostOffset:
        """Where a cluster of zeroes has its place in the file; 0: it has none."""
        place = HostOffset(entry & ENTRY_OFFSET)
        return NO_PLACE if place & (self._cluster_size - 1) else place

    def _append_data(self, runs: list[Run], cluster: int, position: int, length: int, file_size: int) -> None:
        """Append clusters that follow each other in the file from `cluster` on; `position` lies in the first one."""
        if cluster & (self._cluster_size - 1):
            raise CorruptError(
                self._path, f"the data cluster of guest offset {position} is not cluster-aligned ({cluster:#x})"
            )
        host = HostOffset(cluster) + (position & (self._cluster_size - 1))
        inside = file_size - host
        if inside >= length:
            append_run(runs, Kind.DATA, length, host)
            return
        if (host + length - 1) & -self._cluster_size >= file_size:
            raise CorruptError(
                self._path,
                f"the data of guest offset {position} lies at {cluster:#x} and goes past the end of the file "
                f"({file_size} bytes); the file is cut off or corrupt",
            )
        if inside > 0:
            append_run(runs, Kind.DATA, inside, host)
        append_run(runs, Kind.ZERO, length - max(inside, 0))


def compressed_extent(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Where a compressed cluster's data lies: (host offset, bytes), the latter up to a sector more than the stream has.

    At most two clusters long, whatever the entry holds.
    """
    size_bits = cluster_bits - 8
    offset_bits = 62 - size_bits
    offset = entry & ((1 << offset_bits) - 1)
    sectors = ((entry >> offset_bits) & ((1 << size_bits) - 1)) + 1
    return offset, sectors * SECTOR_SIZE - offset % SECTOR_SIZE


def inflate(raw: bytes, size: int) -> bytes | None:
    """Exactly `size` bytes of a raw deflate stream, None if it is broken or too short. What follows is ignored.

    QEMU writes with a window of 4 KiB, but since it unpacks into one buffer it reads any distance that deflate has, and
    other programs write such streams: hence the full window.
    """
    try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, size)
    except zlib.error:
        return None
    return data if len(data) == size else None
