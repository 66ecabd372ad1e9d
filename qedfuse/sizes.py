"""Bytes: sectors, pages of tables and their entries, and rounding. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, TypeVar

SECTOR_SIZE = 512
ENTRY_SIZE = 8
PAGE_SIZE = 4096
PAGE_ENTRIES = PAGE_SIZE // ENTRY_SIZE
PAGE_BITS = PAGE_ENTRIES.bit_length() - 1


if TYPE_CHECKING:

    class _Position(int):
        """Positions of one kind: a number of bytes further on, or the beginning of a unit, is one of the same kind."""

        def __add__(self, other: int, /) -> Self: ...
        def __sub__(self, other: int, /) -> Self: ...
        def __and__(self, other: int, /) -> Self: ...

    class HostOffset(_Position):
        """Bytes from the start of a file that the host stores."""

    class GuestOffset(_Position):
        """Bytes from the start of the disk that the guest sees. Shifted by `cluster_bits`: which cluster it is in."""

        def __rshift__(self, cluster_bits: int, /) -> ClusterIndex: ...

    class ClusterIndex(int):
        """Counts clusters over the whole guest. Shifted by `PAGE_BITS`: the page of an L2 table that has its entry."""

        def __rshift__(self, page_bits: int, /) -> PageIndex: ...
        def __lshift__(self, cluster_bits: int, /) -> GuestOffset: ...
        def __add__(self, other: int, /) -> ClusterIndex: ...

    class PageIndex(int):
        """Counts pages of L2 tables over the whole guest. Shifted by `table_page_bits`: the table that it is in."""

        def __rshift__(self, table_page_bits: int, /) -> TableIndex: ...

    class TableIndex(int):
        """Counts L2 tables over the whole guest: the index of an entry in the L1 table."""

else:  # numbers as any: what they are is for mypy
    GuestOffset = HostOffset = ClusterIndex = PageIndex = TableIndex = int

#: Offsets are signed 64 bits in the kernel.
MAX_OFFSET = (1 << 63) - SECTOR_SIZE


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


_Number = TypeVar("_Number", bound=int)


def round_up(value: _Number, unit: int) -> _Number:
    """`value` rounded up to a multiple of `unit` (any positive unit)."""
    return -(-value // unit) * unit  # type: ignore[return-value]


def round_down(value: _Number, unit: int) -> _Number:
    return value // unit * unit  # type: ignore[return-value]


def whole_sectors(file_size: int) -> int:
    """How long a file is that has `file_size` bytes: it counts in sectors, as it does for QEMU. What the last sector
    lacks reads as zeroes. (One that ends behind the largest offset does not count.)"""
    return min(round_up(file_size, SECTOR_SIZE), MAX_OFFSET)
