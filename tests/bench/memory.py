"""The machine's memory, as far as it disturbs a measurement.

Under a hypervisor free memory may have gone back to the host (free page reporting, ballooning). Whoever uses it next
waits for the host, page by page, which has made the same row three times as slow for one target as for the next.
"""

from __future__ import annotations

import mmap
import os

#: As much as a row uses: an image, what it is made from, and the page cache of both.
ROOM = 1536 << 20


def have_at_hand(size: int = ROOM) -> None:
    """Use so many bytes of memory, or half of what is free, and give them back: what is measured next finds them."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    mmap.mmap(-1, min(size, free // 2), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
