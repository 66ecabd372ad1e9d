"""What a program that uses qedfuse as a library waits for, and holds in memory, while clusters are discarded.

    python -m tests.bench.library longest-wait IMAGE     # milliseconds
    python -m tests.bench.library growth IMAGE           # MiB

The image is one that `fragmented` has made.
"""

from __future__ import annotations

import os
import sys
import time
from array import array
from pathlib import Path

import trio

import qedfuse
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import Header

#: Bytes of the guest whose entries are in one page of a table.
_PAGE_COVERS = 512 * 65536
#: Clusters of the image; their data is a hole of the host's.
CLUSTERS = 1 << 20


def fragmented(path: Path) -> None:
    """All of `CLUSTERS` clusters of 64 KiB are allocated, and no two neighbours are neighbours in the file."""
    geometry = Geometry()
    cluster, table = geometry.cluster_size, geometry.table_bytes
    size = CLUSTERS * cluster
    tables = size // geometry.l2_coverage
    first_table = cluster + table
    first_data = first_table + tables * table
    path.unlink(missing_ok=True)
    with path.open("wb") as disk:
        disk.write(Header(cluster, geometry.table_size, 1, 0, 0, 0, cluster, size).encode())
        disk.seek(cluster)
        disk.write(array("Q", range(first_table, first_data, table)).tobytes())
        disk.seek(first_table)
        stride = CLUSTERS // 2 - 1  # odd: every cluster has its turn
        disk.write(array("Q", (first_data + n * stride % CLUSTERS * cluster for n in range(CLUSTERS))).tobytes())
        disk.truncate(first_data + size)
        os.fsync(disk.fileno())


async def longest_wait(path: str) -> float:
    """Milliseconds that another task has waited for its turn at most, while all is discarded, then zeroed."""
    worst = 0.0

    async def tick() -> None:
        nonlocal worst
        while True:
            begin = time.perf_counter()
            await trio.sleep(0.001)
            worst = max(worst, time.perf_counter() - begin - 0.001)

    async with qedfuse.open_image(path) as image, trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        await image.discard(0, image.size)
        await image.flush()
        await image.zero(0, image.size)
        await image.flush()
        nursery.cancel_scope.cancel()
    return worst * 1000


async def growth(path: str) -> float:
    """MiB that the process has grown by when every cluster has been discarded, in an order that joins none of them."""
    async with qedfuse.open_image(path) as image:
        cluster = image.size // CLUSTERS
        for offset in range(0, image.size, _PAGE_COVERS):  # the tables that it will hold anyway
            await image.read(offset, 512)
        before = _resident()
        for number in range(CLUSTERS):
            await image.discard(number * 5 % CLUSTERS * cluster, cluster)
        await image.flush()
        return (_resident() - before) / (1 << 20)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


FIGURES = {"longest-wait": longest_wait, "growth": growth}

if __name__ == "__main__":
    print(trio.run(FIGURES[sys.argv[1]], sys.argv[2]))
