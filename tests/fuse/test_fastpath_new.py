"""Writes into new clusters, answered by the native fast path: what comes of them is what Python would have made."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.helpers.images.chains import check_is_clean
from tests.helpers.mounts.fastpath_modes import (
    CLUSTER,
    MODES_ARE_CHOSEN_HERE,
    flat,
    mode,
    run_fallocate,
    words,
)
from tests.helpers.mounts.mounts import counters, mounted, need_fuse, opened
from tests.helpers.qemu.cli import new_image, qemu_img

__all__ = ["mode"]  # a fixture

pytestmark = MODES_ARE_CHOSEN_HERE

MIB = 1 << 20
_PUNCH_HOLE = 3


def random_operations(fd: int, model: bytearray, rnd: random.Random, number: int, *, punch: bool) -> None:
    """Writes of all sizes, zeroes among them, punches and flushes; the model has what must be read afterwards."""
    for _ in range(number):
        size = rnd.choice([512, 4096, 4096, 10_000, CLUSTER, 200_000])
        start = rnd.randrange(0, len(model) - size)
        if rnd.random() < 0.5:
            start &= -4096
        kind = rnd.random()
        if kind < 0.8:
            data = bytes(size) if kind < 0.1 else rnd.randbytes(size)
            assert os.pwrite(fd, data, start) == size
            model[start : start + size] = data
        elif kind < 0.9 and punch:
            run_fallocate(fd, _PUNCH_HOLE, start, size)
            model[start : start + size] = bytes(size)
        else:
            os.fsync(fd)
        at = rnd.randrange(0, len(model) - 20_000)
        assert os.pread(fd, 20_000, at) == model[at : at + 20_000]


@pytest.mark.parametrize("cluster", [4096, 65536, 2 * MIB])
@pytest.mark.parametrize("below", ["nothing", "raw", "qed"])
def test_random_operations_against_a_model(tmp_path: Path, raw: Path, mode: str, below: str, cluster: int) -> None:
    need_fuse()
    rnd = random.Random(f"{below}{cluster}")
    size = 10 * MIB
    model = bytearray(size)
    chain: tuple[str | Path, ...] = ()
    if below != "nothing":
        base = tmp_path / "base.raw"
        model[: 6 * MIB + 700] = rnd.randbytes(6 * MIB + 700)
        base.write_bytes(model[: 6 * MIB + 700])
        chain = ("-b", base, "-F", "raw")
    if below == "qed":
        middle = tmp_path / "middle.qed"
        qemu_img("convert", "-f", "raw", "-O", "qed", "-o", "cluster_size=16k", base, middle)
        chain = ("-b", middle, "-F", "qed")
    image = new_image(tmp_path / "disk.qed", str(size), "-o", f"cluster_size={cluster}", *chain)
    with mounted(image, raw, *words(mode), "-o", "direct_io"):
        with opened(raw) as fd:
            random_operations(fd, model, rnd, 120, punch=mode == "on")
        if mode == "on":
            assert counters(raw)["writes"] > 40
        assert raw.read_bytes() == model
    assert flat(image) == model


def test_most_new_clusters_need_no_python(tmp_path: Path, raw: Path) -> None:
    need_fuse()
    image = new_image(tmp_path / "disk.qed", "64M")
    with mounted(image, raw, "-o", "direct_io"), opened(raw) as fd:
        for cluster in range(500):
            os.pwrite(fd, b"x" * 4096, cluster * CLUSTER)
        assert counters(raw)["writes"] > 480
        os.fsync(fd)
    check_is_clean(image)
    assert flat(image)[::CLUSTER][:500] == b"x" * 500


def test_freed_clusters_are_used_again(tmp_path: Path, raw: Path) -> None:
    need_fuse()
    image = new_image(tmp_path / "disk.qed", "64M")
    with mounted(image, raw, "-o", "direct_io"), opened(raw) as fd:
        os.pwrite(fd, b"x" * (4 * MIB), 0)
        os.fsync(fd)
        end = image.stat().st_size
        for turn in range(1, 6):
            run_fallocate(fd, _PUNCH_HOLE, (turn - 1) * 4 * MIB, 4 * MIB)
            os.fsync(fd)  # the entries are durable, the clusters punched
            os.pwrite(fd, b"y", 60 * MIB + turn)
            os.fsync(fd)  # the punch is durable
            for start in range(turn * 4 * MIB, (turn + 1) * 4 * MIB, CLUSTER):
                os.pwrite(fd, b"z" * 4096, start + 4096)
        assert image.stat().st_size <= end + 8 * MIB
        assert os.pread(fd, 8192, 5 * 4 * MIB) == bytes(4096) + b"z" * 4096
    assert flat(image)[5 * 4 * MIB :][:8192] == bytes(4096) + b"z" * 4096
