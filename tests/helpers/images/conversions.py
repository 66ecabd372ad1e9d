"""Sources for conversions, and what is expected of a converted image."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

from qedfuse.sizes import round_up
from tests.helpers.images.hostile import GOOD, C, words
from tests.helpers.qemu.cli import qemu_img

MIB = 1 << 20

#: A raw file of an odd size, and images that are shorter and longer than it, ending inside clusters.
ODD = 5 * MIB + 333
CHAINS: list[list[tuple[str, int]]] = [
    [("raw", ODD)],
    [("qed", 5 * MIB + 512)],
    [("qcow2", 5 * MIB + 512)],
    [("raw", ODD), ("qed", 3 * MIB + 512)],
    [("qcow2", 5 * MIB), ("qed", 8 * MIB + 1024)],
    [("raw", ODD), ("qed", 3 * MIB), ("qed", 7 * MIB + 512)],
    [("qed", 6 * MIB), ("qcow2", 4 * MIB), ("qed", 5 * MIB)],
]
GEOMETRIES = [(4096, 2), (4096, 16), (65536, 4), (2 * MIB, 2), (2 * MIB, 8)]


def chain_names(chains: list[list[tuple[str, int]]]) -> list[str]:
    """Of tests that take a chain."""
    return ["-".join(format for format, _ in chain) for chain in chains]


def scatter(path: Path, format: str, size: int, seed: int) -> None:
    """Writes, zeroes, and data that is zeroes, all over an image; none of which QEMU's qed driver miscounts."""
    rnd = random.Random(seed)
    commands = []
    for _ in range(25):
        offset = rnd.randrange(size // 512) * 512
        length = min(rnd.choice([512, 4096, 70_144, 300_032, 1_500_160]), size - offset) // 512 * 512
        kind = rnd.choice([f"-P {rnd.randrange(1, 256)}", "-P 7", "-P 0", "-z"])
        commands.append(f"write -q {kind} {offset} {length}\n")
    done = subprocess.run(
        ["qemu-io", "-t", "unsafe", "-f", format, str(path)],
        input="".join(commands),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "failed" not in done.stdout + done.stderr, done


def make_chain(directory: Path, *layers: tuple[str, int], seed: int = 1, options: str = "") -> Path:
    """Images over each other, bottom first, as (format, size), with something everywhere. Returns the top one.

    They are named 0.raw, 1.qed and so on. `options` are for QED.
    """
    path: Path | None = None
    for number, (format, size) in enumerate(layers):
        below = ["-b", path.name, "-F", path.suffix[1:]] if path else []
        path = directory / f"{number}.{format}"
        more = ["-o", options] if options and format == "qed" else []
        qemu_img("create", "-q", "-f", format, *more, *below, path.name, str(size), cwd=directory)
        scatter(path, format, round_up(size, 512), seed + number)
        if format == "raw":
            os.truncate(path, size)
    assert path is not None
    return path


def flat(image: Path) -> Path:
    """What QEMU reads, as a raw file."""
    raw = image.with_suffix(".flat")
    qemu_img("convert", "-f", image.suffix[1:], "-O", "raw", image, raw)
    return raw


def usage(path: Path) -> int:
    """Bytes of the file that are no hole. (`st_blocks` counts what the file system needs to find them, too.)"""
    found = position = 0
    with path.open("rb") as file:
        while True:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return found
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found += position - start


def qemu_finds_no_error(image: Path) -> None:
    """But for its miscount: one in every cluster_size - 1 clusters of a file is "leaked" (7.2, 10.0)."""
    command = ["qemu-img", "check", "-f", "qed", "--output=json", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    report = json.loads(done.stdout)
    with image.open("rb") as file:
        cluster_size = struct.unpack("<4xI", file.read(8))[0]
    passed_over = image.stat().st_size // cluster_size // (cluster_size - 1)
    assert report.get("corruptions", 0) == report["check-errors"] == 0, report
    assert report.get("leaks", 0) <= passed_over, report


def endless(directory: Path, content: bytes = bytes(C)) -> Path:
    """An image of 256 GiB whose clusters are all one and the same: it takes no space, and many minutes to copy."""
    entries = 8192
    header = replace(GOOD, table_size=16, image_size=entries * entries * C)
    path = directory / "endless.qed"
    with path.open("wb") as file:
        file.write(header.encode())
        file.seek(C)
        file.write(words(*[17 * C] * entries))
        file.write(words(*[33 * C] * entries))
        file.write(content)
    return path
