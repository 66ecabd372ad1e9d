"""Images with clusters that are holes of the host, and what is told of them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from qedfuse.chain.opening import open_image
from qedfuse.layers.runs import Kind
from tests.helpers.images.chains import run
from tests.helpers.mounts.acknowledging import punch
from tests.helpers.qemu.cli import qedfuse, qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB

Segments = list[tuple[int, int]]


def full_image(path: Path, size: int, *options: str, pattern: int = 5) -> Path:
    """An image with data in every cluster."""
    qemu_img("create", "-q", "-f", "qed", *options, path, str(size))
    for start in range(0, size, 8 * MIB):
        qemu_io(path, f"write -P {pattern} {start} {min(8 * MIB, size - start)}")
    return path


def clusters_of(path: Path) -> list[int]:
    """Where each cluster of an image lies in its file."""

    async def find() -> list[int]:
        found: list[int] = []
        async with open_image(path, read_only=True) as image:
            size = image.geometry.cluster_size
            for offset in range(0, image.size, size):
                (at,) = await image.map(offset, min(size, image.size - offset))
                assert at.kind is Kind.DATA
                found.append(at.host)
        return found

    return run(find)


def punch_guest(path: Path, *ranges: tuple[int, int]) -> None:
    """Give the host back what has these ranges (offset, size) of a full image, and change nothing of its tables."""
    places = clusters_of(path)
    with path.open("r+b") as file:
        for offset, size in ranges:
            while size:
                skip = offset % CLUSTER
                length = min(size, CLUSTER - skip)
                punch(file.fileno(), places[offset // CLUSTER] + skip, length)
                offset, size = offset + length, size - length
        os.fsync(file.fileno())


def our_map(path: Path, *words: str) -> list[dict[str, Any]]:
    done = qedfuse("map", "--output=json", *words, path)
    assert done.code == 0, done
    entries: list[dict[str, Any]] = json.loads(done.out)
    return entries


def data_of(entries: list[dict[str, Any]]) -> Segments:
    merged: Segments = []
    for entry in entries:
        start, end = entry["start"], entry["start"] + entry["length"]
        if not entry["data"]:
            continue
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, end))
    return merged


def segments(fd: int) -> Segments:
    """Data as lseek tells it."""
    result: Segments = []
    hole = 0
    while True:
        try:
            data = os.lseek(fd, hole, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return result
        hole = os.lseek(fd, data, os.SEEK_HOLE)
        result.append((data, hole))


def held(path: Path) -> int:
    return path.stat().st_blocks * 512
