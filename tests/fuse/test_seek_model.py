"""SEEK_DATA and SEEK_HOLE between writes, holes and changes of size: what was found before must not be believed when it
is no longer so."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from tests.helpers.mounts.acknowledging import punch
from tests.helpers.mounts.modes import NEEDS_NATIVE
from tests.helpers.mounts.mounts import mounted
from tests.helpers.qemu.cli import qedfuse, qemu_img

pytestmark = NEEDS_NATIVE

CLUSTER = 4096


def seek(fd: int, offset: int, whence: int) -> int | None:
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def expected(data: set[int], size: int, offset: int, whence: int) -> int | None:
    """`data`: the clusters that are."""
    if offset >= size:
        return None
    position = offset
    while position < size and (position // CLUSTER in data) != (whence == os.SEEK_DATA):
        position = (position // CLUSTER + 1) * CLUSTER
    if whence == os.SEEK_HOLE:
        return min(position, size)
    return position if position < size else None


@pytest.mark.parametrize("options", [["-o", "direct_io"], []], ids=["direct_io", "writeback"])
def test_seeks_between_changes(tmp_path: Path, options: list[str]) -> None:
    image, raw = tmp_path / "disk.qed", tmp_path / "disk.raw"
    raw.touch()
    qemu_img("create", "-q", "-f", "qed", "-o", f"cluster_size={CLUSTER},table_size=2", image, "4M")
    rnd = random.Random(5)
    size, data = 4 << 20, set[int]()
    with mounted(image, raw, *options):
        fd = os.open(raw, os.O_RDWR)
        for turn in range(300):
            clusters = size // CLUSTER
            first = rnd.randrange(clusters)
            count = min(rnd.choice([1, 3, 100]), clusters - first)
            action = rnd.choice(["write", "write", "punch", "truncate", "nothing"])
            if action == "write":
                os.pwrite(fd, rnd.randbytes(count * CLUSTER), first * CLUSTER)
                data.update(range(first, first + count))
            elif action == "punch":
                punch(fd, first * CLUSTER, count * CLUSTER)
                data.difference_update(range(first, first + count))
            elif action == "truncate" and turn % 5 == 0:
                size = rnd.randrange(256, 1024) * CLUSTER
                os.truncate(raw, size)
                data = {cluster for cluster in data if cluster < size // CLUSTER}
            for _ in range(6):
                offset, whence = rnd.randrange(size + CLUSTER), rnd.choice([os.SEEK_DATA, os.SEEK_HOLE])
                for step in range(3):  # on, inside what was just found
                    found = seek(fd, offset + step * 512, whence)
                    assert found == expected(data, size, offset + step * 512, whence), (turn, action, offset, step)
        os.close(fd)
    assert qedfuse("check", image).code == 0
