"""Ways to damage the sound image of `check_images.sound`. QEMU knows all of these."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace

from qedfuse.qed.header import FEATURE_NEED_CHECK, HEADER_BYTES, Header
from tests.helpers.images.check_images import (
    CLUSTER,
    COVERAGE,
    ENTRIES,
    TABLE,
    Builder,
    sound,
)

Fault = Callable[[Builder, list[int], list[list[int]]], None]


def nothing(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    pass


def l1_misaligned(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(1, tables[1] + 512)


def l1_reserved_value(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(1, 1)


def l1_in_header(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.raw[CLUSTER:CLUSTER] = bytes(CLUSTER)
    image.header = Header(CLUSTER, TABLE, 2, 0, 0, 0, 2 * CLUSTER, image.header.image_size)
    image.raw[:HEADER_BYTES] = image.header.encode()
    for index, table in enumerate(tables):
        image.set_l1(index, table + CLUSTER)
        for entry in range(ENTRIES):
            (value,) = struct.unpack_from("<Q", image.raw, table + CLUSTER + 8 * entry)
            if value > 1:
                image.set_l2(table + CLUSTER, entry, value + CLUSTER)
    image.set_l1(5, CLUSTER)


def l1_outside(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(1, len(image.raw))
    image.set_l1(7, 1 << 62)
    image.set_l1(8, (1 << 64) - CLUSTER)


def l1_partly_outside(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(6, image.junk())


def l2_misaligned(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[0], 3, data[0][3] + 512)
    image.set_l2(tables[2], 1023, 2)


def l2_in_header(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[0], 3, 0x800)
    image.set_l2(tables[0], 4, 3)


def l2_outside(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[0], 3, len(image.raw))
    image.set_l2(tables[1], 50, (1 << 63) + CLUSTER)
    image.set_l2(tables[1], 51, (1 << 64) - CLUSTER)
    image.set_l2(tables[1], 52, (1 << 63) - CLUSTER)


def l2_in_a_cut_off_cluster(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    del image.raw[-1000:]


def file_cut_off(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    del image.raw[data[1][5] :]


def data_twice(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[0], 800, data[0][0])
    image.set_l2(tables[1], 800, data[0][0])
    image.set_l2(tables[1], 801, data[2][7])


def all_data_twice(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    for entry, offset in enumerate(data[0]):
        image.set_l2(tables[2], 60 + entry, offset)


def table_twice(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(2, tables[0])


def tables_overlap(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    """The second half of table 0 is the first half of table 2."""
    image.set_l2(tables[0], 600, 0)
    image.set_l1(2, tables[0] + CLUSTER)
    image.set_l2(tables[0], 513, data[2][0])
    image.set_l2(tables[0], 514, data[2][1])


def data_is_a_later_table(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[0], 900, tables[2] + CLUSTER)


def data_is_an_earlier_table(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[2], 900, tables[0])


def data_is_its_own_table(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[1], 900, tables[1])


def data_is_the_l1_table(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[1], 900, image.l1)


def l1_refers_to_itself(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(2, image.l1)


def table_in_data(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(2, data[0][10])


def garbage_table(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.raw[tables[1] : tables[1] + TABLE * CLUSTER] = random.Random(5).randbytes(TABLE * CLUSTER)


def leaks_in_the_middle(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.junk(3)
    image.data(tables[0], 500)
    image.junk(1)
    image.data(tables[0], 502)


def leaks_at_the_end(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.junk(3)


def leaks_and_a_cut_off_cluster(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.junk(3)
    del image.raw[-1000:]


def leaks_one_by_one(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    """Between data, and a table that is the last in the file: it needs a place that is long enough. And clusters in
    use that are holes of the host, where the leaked ones hold data."""
    image.header = Header(CLUSTER, TABLE, 1, 0, 0, 0, CLUSTER, 6 * COVERAGE)
    image.raw[:HEADER_BYTES] = image.header.encode()
    for entry in range(0, 40, 2):
        image.set_l2(tables[0], entry, 0)
    image.set_l2(tables[1], 910, image.take())
    image.data(image.table(3), 0, 5)
    image.set_l2(tables[1], 911, image.take(2))
    image.data(image.table(4), 1023)
    image.table(5)


def tables_too_close(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    """Nowhere between the tables is room for another one: all must move to fill one gap."""
    fresh = Builder(6 * COVERAGE)
    fresh.junk()
    for index in range(5):
        table = fresh.table(index)
        if index % 2:
            fresh.data(table, 7 * index)
    image.header = fresh.header
    image.raw[:] = fresh.raw


def l1_at_the_end(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    """The L1 table must move, and the tables and data that moved before it and after it are found."""
    image.set_l2(tables[1], 20, 0)
    old, table = image.l1, image.table(7)
    image.data(table, 1, 0)
    l1 = image.take(TABLE)
    image.raw[l1:] = image.raw[old : old + TABLE * CLUSTER]
    image.header = Header(CLUSTER, TABLE, 1, 0, 0, 0, l1, 8 * COVERAGE)
    image.raw[:HEADER_BYTES] = image.header.encode()


def lost_table(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(1, 0)


def cut_short(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    """Past the image's end: some entries of a table, and all of another one."""
    image.header = Header(CLUSTER, TABLE, 1, 0, 0, 0, CLUSTER, COVERAGE + 20 * CLUSTER + 512)
    image.raw[:HEADER_BYTES] = image.header.encode()


def cut_short_and_leaks(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    cut_short(image, tables, data)
    leaks_in_the_middle(image, tables, data)
    l1_at_the_end(image, tables, data)
    image.header = replace(image.header, image_size=COVERAGE + 20 * CLUSTER + 512)
    image.raw[:HEADER_BYTES] = image.header.encode()


def not_closed(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.raw[16] |= FEATURE_NEED_CHECK


def many(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    for fault in (not_closed, leaks_in_the_middle, data_twice, l2_misaligned, data_is_a_later_table, l1_outside):
        fault(image, tables, data)
    image.set_l1(4, tables[0])


#: Nothing is wrong with these but that clusters are leaked.
LEAKS = [
    leaks_in_the_middle,
    leaks_at_the_end,
    leaks_and_a_cut_off_cluster,
    leaks_one_by_one,
    tables_too_close,
    l1_at_the_end,
    lost_table,
]
#: Nothing is wrong with these.
CUT_SHORT = [cut_short, cut_short_and_leaks]
FAULTS = [
    nothing,
    l1_misaligned,
    l1_reserved_value,
    l1_in_header,
    l1_outside,
    l1_partly_outside,
    l2_misaligned,
    l2_in_header,
    l2_outside,
    l2_in_a_cut_off_cluster,
    file_cut_off,
    data_twice,
    all_data_twice,
    table_twice,
    tables_overlap,
    data_is_a_later_table,
    data_is_an_earlier_table,
    data_is_its_own_table,
    data_is_the_l1_table,
    l1_refers_to_itself,
    table_in_data,
    garbage_table,
    *LEAKS,
    not_closed,
    many,
]


def dangling_where_copies_go(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    """Entries that would refer to the copies as soon as the file grows; and a last part of a cluster."""
    data_twice(image, tables, data)
    image.raw += b"tail" * 100
    end = len(image.raw) // CLUSTER * CLUSTER
    image.set_l2(tables[2], 300, end)
    image.set_l2(tables[2], 301, end + CLUSTER)
    image.set_l1(3, end)


def broken(fault: Fault) -> bytearray:
    image, tables, data = sound()
    fault(image, tables, data)
    return image.raw
