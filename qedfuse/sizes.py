"""Bytes: sectors, pages of tables and their entries, and rounding. Pure."""

from __future__ import annotations

SECTOR_SIZE = 512
ENTRY_SIZE = 8
PAGE_SIZE = 4096
PAGE_ENTRIES = PAGE_SIZE // ENTRY_SIZE
PAGE_BITS = PAGE_ENTRIES.bit_length() - 1


#: Offsets are signed 64 bits in the kernel.
MAX_OFFSET = (1 << 63) - SECTOR_SIZE


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def round_up(value: int, unit: int) -> int:
    """`value` rounded up to a multiple of `unit` (any positive unit)."""
    return -(-value // unit) * unit


def round_down(value: int, unit: int) -> int:
    return value // unit * unit


def whole_sectors(file_size: int) -> int:
    """How long a file is that has `file_size` bytes: it counts in sectors, as it does for QEMU. What the last sector
    lacks reads as zeroes. (One that ends behind the largest offset does not count.)"""
    return min(round_up(file_size, SECTOR_SIZE), MAX_OFFSET)
