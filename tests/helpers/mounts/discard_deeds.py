"""Tools that discard or zero on a raw file, as deeds that can be done to any raw file of SIZE bytes.

A deed takes the file, with random data at DATA, and a directory for what it needs besides.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.helpers.judges.discards import KIB, MIB
from tests.helpers.mounts.guests import loop_device, run

Deed = Callable[[Path, Path], None]

SIZE = 24 * MIB
#: Offset and size of what is written before the tool comes: the rest is the backing file's, or nobody's.
DATA = (3 * MIB + 300 * KIB, 9 * MIB)

#: What is discarded: across the data's begin; inside it by odd bytes; by whole clusters, most of them.
_BEGIN, _ODD, _EVEN = (MIB, 6 * MIB), (8 * MIB + 4711, 900_001), (9 * MIB, 3 * MIB)


def _device(*words: str) -> Deed:
    """A command for parts of a loop device."""

    def do(path: Path, scratch: Path) -> None:
        with loop_device(path) as device:
            for offset, size in (_BEGIN, (8 * MIB + 5 * 512, 700 * KIB), _EVEN):
                run(*words, "-o", str(offset), "-l", str(size), device)

    return do


def _whole_device(*words: str) -> Deed:
    def do(path: Path, scratch: Path) -> None:
        with loop_device(path) as device:
            run(*words, device)

    return do


def _fallocate(*words: str) -> Deed:
    def do(path: Path, scratch: Path) -> None:
        for offset, size in (_BEGIN, _ODD, _EVEN):
            run("fallocate", *words, "-o", str(offset), "-l", str(size), path)

    return do


def _past_the_end(path: Path, scratch: Path) -> None:
    run("fallocate", "-z", "-o", str(10 * MIB), "-l", str(SIZE - 9 * MIB), path)


def _dig_holes(path: Path, scratch: Path) -> None:
    """Zeroes are written first, then found and discarded."""
    with path.open("r+b") as file:
        for offset, size in (_BEGIN, _ODD, _EVEN):
            file.seek(offset)
            file.write(bytes(size))
    run("sync", path)
    run("fallocate", "-d", path)


def _onto(*words: str) -> Deed:
    """A tool that writes a sparse file, SOURCE, over all of TARGET."""

    def do(path: Path, scratch: Path) -> None:
        source = scratch / "sparse"
        with source.open("wb") as file:
            file.truncate(SIZE)
            for number, offset in enumerate(range(0, SIZE, 3 * MIB)):
                file.seek(offset)
                file.write(random.Random(number).randbytes(100 * KIB))
        run(*(word.replace("SOURCE", str(source)).replace("TARGET", str(path)) for word in words))

    return do


def _shrink_and_grow(path: Path, scratch: Path) -> None:
    for size in (10 * MIB + 512 * 7, SIZE, 4 * MIB, SIZE):
        run("truncate", "-s", str(size), path)


DEEDS: dict[str, Deed] = {
    "blkdiscard": _device("blkdiscard", "-f"),
    "blkdiscard-all": _whole_device("blkdiscard", "-f"),
    "blkdiscard-z": _device("blkdiscard", "-f", "-z"),
    "fallocate-p": _fallocate("-p"),
    "fallocate-z": _fallocate("-z", "-n"),
    "fallocate-z-past-the-end": _past_the_end,
    "fallocate-d": _dig_holes,
    "cp": _onto("cp", "--sparse=always", "SOURCE", "TARGET"),
    "dd": _onto("dd", "if=SOURCE", "of=TARGET", "bs=64k", "conv=sparse"),
    "rsync": _onto("rsync", "--inplace", "--sparse", "--no-whole-file", "--ignore-times", "SOURCE", "TARGET"),
    "qemu-img": _onto("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "SOURCE", "TARGET"),
    "truncate": _shrink_and_grow,
}
#: Those that cannot do without fallocate.
FALLOCATES = {"blkdiscard", "blkdiscard-all", "fallocate-p", "fallocate-z", "fallocate-z-past-the-end", "fallocate-d"}
