"""Leaks in a file of more than 65,536 clusters, where QEMU miscounts."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

from qedfuse.qed.header import Header
from tests.helpers.images.leaky import drop, expect_cured, flat
from tests.helpers.judges.check_tools import qemu_check, sparse

KIB = 1 << 10


def test_a_sparse_file_beyond_4_gib(tmp_path: Path) -> None:
    """It stays sparse: what moves as a hole is one afterwards. QEMU counts a leak that is none, before and after."""
    rng = random.Random(7)
    cluster, number = 64 * KIB, 74000
    head = Header(cluster, 4, 1, 0, 0, 0, cluster, number * cluster)
    places = list(range(5 + 12, 5 + 12 + number))
    rng.shuffle(places)
    entries = array("Q", (place * cluster for place in places))
    data = {place * cluster + 4096 * rng.randrange(16): rng.randbytes(4096) for place in rng.sample(places, 300)}
    tables = {(5 + 4 * index) * cluster: entries[index << 15 : (index + 1) << 15].tobytes() for index in range(3)}
    l1 = {cluster: array("Q", tables).tobytes()}
    path = sparse(tmp_path / "image.qed", head, (17 + number) * cluster, {**data, **tables, **l1})
    leaks = drop(path, rng, 0.08)
    assert path.stat().st_size - leaks * cluster > 65536 * cluster
    held = path.stat().st_blocks
    expect_cured(path, leaks, flat(path), phantoms=1)
    assert path.stat().st_blocks <= held
    assert qemu_check(path)[1]["leaks"] == 1, "QEMU's, not ours; if it is gone, the note in check.py goes, too"
