"""Runs of entries in a page of a table: how far they continue each other. Pure, and fast: a page has 512 of them, and a
search through a large image looks at millions.
"""

from __future__ import annotations

import struct

from qedfuse.qed.geometry import UNALLOCATED, ZERO_CLUSTER
from qedfuse.qed.table_pages import Page
from qedfuse.sizes import ENTRY_SIZE, PAGE_ENTRIES

#: The bytes of a page that says one thing throughout: comparing with it is faster than looking at each entry.
_UNIFORM = {entry: entry.to_bytes(ENTRY_SIZE, "little") * PAGE_ENTRIES for entry in (UNALLOCATED, ZERO_CLUSTER)}
#: Pages as one number, in which each entry is 1, or its own index: whether a page is one run is told by arithmetic six
#: times faster than by looking at each entry.
_EACH_1 = int.from_bytes(_UNIFORM[ZERO_CLUSTER], "little")
_EACH_NEXT = int.from_bytes(struct.pack(f"<{PAGE_ENTRIES}Q", *range(PAGE_ENTRIES)), "little")


def end_of_run(page: Page, first: int, stop: int, cluster_size: int) -> int:
    """The index behind the last entry of the run that begins at `first`, at most `stop`. A run is equal entries that
    are no offsets, or offsets each one cluster (bytes) behind the one before."""
    entry = page[first]
    here = first + 1
    if entry <= ZERO_CLUSTER:
        if page[first:stop].tobytes() == _UNIFORM[entry][: (stop - first) * ENTRY_SIZE]:
            return stop
        while here < stop and page[here] == entry:
            here += 1
        return here
    if (
        stop - first == PAGE_ENTRIES
        and page[-1] == entry + (PAGE_ENTRIES - 1) * cluster_size
        and int.from_bytes(page.tobytes(), "little") == entry * _EACH_1 + cluster_size * _EACH_NEXT
    ):
        return stop
    following = entry + cluster_size
    while here < stop and page[here] == following:
        here += 1
        following += cluster_size
    return here


def unallocated_from(page: Page, first: int) -> int:
    """How many entries from `first` on, to the end of the page at most, are 0."""
    rest = page[first:].tobytes()
    if rest == _UNIFORM[UNALLOCATED][: len(rest)]:
        return len(rest) // ENTRY_SIZE
    return (len(rest) - len(rest.lstrip(b"\0"))) // ENTRY_SIZE


assert UNALLOCATED == 0 and ZERO_CLUSTER == 1
