"""Runs of entries in a page, told as by looking at each entry."""

from __future__ import annotations

import random

from qedfuse.qed.entry_runs import end_of_run, unallocated_from
from qedfuse.qed.table_pages import Page
from qedfuse.sizes import PAGE_ENTRIES

CLUSTER = 4096


def page_of(entries: list[int]) -> Page:
    page = memoryview(bytearray(8 * PAGE_ENTRIES)).cast("Q")
    for index, entry in enumerate(entries):
        page[index] = entry
    return page


def slowly(entries: list[int], first: int, stop: int) -> int:
    step = CLUSTER if entries[first] > 1 else 0
    here = first + 1
    while here < stop and entries[here] == entries[here - 1] + step:
        here += 1
    return here


def pages() -> list[list[int]]:
    """Uniform ones, one run, such with one other entry at each kind of place, and mixtures."""
    rnd = random.Random(1)
    whole = [[0] * PAGE_ENTRIES, [1] * PAGE_ENTRIES, [(9 + index) * CLUSTER for index in range(PAGE_ENTRIES)]]
    whole.append([(1 << 64) - CLUSTER + index % 2 for index in range(PAGE_ENTRIES)])
    found = [*whole]
    for entries in whole:
        for place in (0, 1, 7, 255, 510, 511):
            for other in (0, 1, 2, CLUSTER, (9 + place) * CLUSTER + 1, (9 + place - 1) * CLUSTER):
                found.append([*entries[:place], other, *entries[place + 1 :]])
    for _ in range(100):
        entries = []
        while len(entries) < PAGE_ENTRIES:
            start, step = rnd.choice([(0, 0), (1, 0), (rnd.randrange(2, 1 << 40) * CLUSTER, CLUSTER), (3, CLUSTER)])
            entries += [start + number * step for number in range(rnd.choice([1, 2, 3, 60, 300]))]
        found.append(entries[:PAGE_ENTRIES])
    return found


def test_a_run_ends_where_the_next_entry_does_not_continue_it() -> None:
    rnd = random.Random(2)
    for entries in pages():
        page = page_of(entries)
        ranges = [(0, PAGE_ENTRIES), (0, 1), (511, PAGE_ENTRIES), (1, PAGE_ENTRIES), (0, 511)]
        ranges += [(first, rnd.randint(first + 1, PAGE_ENTRIES)) for first in rnd.sample(range(PAGE_ENTRIES), 20)]
        for first, stop in ranges:
            assert end_of_run(page, first, stop, CLUSTER) == slowly(entries, first, stop)


def test_what_is_unallocated_is_counted() -> None:
    """Also before entries with low bytes of zeroes: little-endian, and some are powers of two."""
    for entries in [*pages(), [0] * 500 + [1 << 40] * 12, [0] * 3 + [256] + [0] * 508]:
        page = page_of(entries)
        for first in range(PAGE_ENTRIES):
            count = next((n for n, entry in enumerate(entries[first:]) if entry), PAGE_ENTRIES - first)
            assert unallocated_from(page, first) == count
