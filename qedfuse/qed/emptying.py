"""Emptying an overlay whose contents its backing file has by now, durably: what a guest reads is the same throughout.

The rulebook
============

    1 entries   the L1 table becomes zeroes (a hole, where the host can); sync
    2 place     only if the L1 table does not begin right behind the header: there, zeroes; sync. Then the header says
                that it does; sync. On a block device it stays where it is
    3 cut       the file is cut behind the table; sync. A device keeps its size

What a crash leaves:

    1   each L1 entry (8 aligned bytes) is old or 0. With the old one the guest reads the image's own clusters, of which
        nothing is written over; with 0 it reads the same from the backing file. Clusters of entries that are gone leak
    2   no entry: zeroes in what has leaked, and in the old table, which is zeroes. The header (one sector) is old or
        new, and either names a table of zeroes
    3   a longer file, leaked clusters

In every case doing it again finishes it. Header and name of the backing file stay but for the table's place, and so
does the image's size. Only the caller knows that the backing file is durable: that sync comes first.
"""

from __future__ import annotations

from dataclasses import replace

from qedfuse.host.storage import Storage
from qedfuse.qed.header import Header


async def empty_image(storage: Storage, header: Header) -> Header:
    """Make an image that is closed, but locked, one without any cluster; durable on return. `header` is the file's.
    Returns the new one. Raises OSError. Cancellation is harmless."""
    size = header.geometry.table_bytes
    await storage.punch(header.l1_table_offset, size)
    await storage.sync()
    if storage.fixed:
        return header
    if header.l1_table_offset != header.header_bytes:
        await storage.punch(header.header_bytes, size)
        await storage.sync()
        header = replace(header, l1_table_offset=header.header_bytes)
        await storage.write(0, [header.encode()])
        await storage.sync()
    await storage.truncate(header.header_bytes + size)
    await storage.sync()
    return header
