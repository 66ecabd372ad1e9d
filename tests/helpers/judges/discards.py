"""What discards on a mounted raw file must leave behind, whatever tool has asked for them.

A *twin* is a plain raw file with the same content, to which the same is done: it says what must be read afterwards.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.mounts.guests import run
from tests.helpers.mounts.modes import makes_holes
from tests.helpers.mounts.mounts import EXTRA_OPTIONS
from tests.helpers.qemu.cli import qedfuse

KIB = 1 << 10
MIB = 1 << 20

#: Whether fallocate, and so discard, reaches the mounts of this run.
HOLES = "--no-fastpath" not in EXTRA_OPTIONS and makes_holes(())

#: "none", and the formats of backing files.
BELOW = ("none", "raw", "qed", "qcow2")

_NAMES = {4 * KIB: "4k", 16 * KIB: "16k", 64 * KIB: "64k", 512 * KIB: "512k", 2 * MIB: "2M"}


def cases(covering: list[tuple[object, ...]], *values: object) -> Sequence[object]:
    """The covering cases for the ordinary run, and all others marked as slow."""
    everything = itertools.product(*values)  # type: ignore[call-overload]
    rest = [case for case in everything if case not in covering]

    def named(case: tuple[object, ...]) -> str:
        return "-".join(_NAMES.get(word, str(word)) if isinstance(word, int) else str(word) for word in case)

    return [pytest.param(*case, id=named(case)) for case in covering] + [
        pytest.param(*case, id=named(case), marks=pytest.mark.slow) for case in rest
    ]


def create(path: Path, size: int, cluster: int, below: str = "none") -> Path:
    """An image of `size` bytes. A backing file is as large, and has old data all over; its raw content is `base(path)`,
    whatever its format."""
    options: list[str | Path] = []
    if below != "none":
        with base(path).open("wb") as file:
            file.truncate(size)
            rnd = random.Random(size)
            for offset in range(0, size - MIB, size // 8):
                file.seek(offset)
                file.write(rnd.randbytes(MIB))
        backing = path.with_suffix(f".base.{below}")
        if below != "raw":
            run("qemu-img", "convert", "-f", "raw", "-O", below, base(path), backing)
        options = ["-b", backing, "-F", below]
    run("qemu-img", "create", "-q", "-f", "qed", "-o", f"cluster_size={cluster}", *options, path, str(size))
    return path


def base(image: Path) -> Path:
    return image.with_suffix(".base.raw")


def make_twin(image: Path, size: int) -> Path:
    """A raw file that reads as an image does that `create` has just made."""
    twin = image.with_suffix(".twin")
    if base(image).exists():
        run("cp", "--sparse=always", base(image), twin)
    else:
        twin.touch()
    os.truncate(twin, size)
    return twin


def space(path: Path) -> int:
    """Bytes that a file takes on the host, when it has been written there."""
    run("sync", path)  # ext4 counts what it will need for the file's own tables before it has allocated them
    return path.stat().st_blocks * 512


def own_data(twin: Path, image: Path) -> int:
    """Bytes in the blocks of 4 KiB that an image must have data of its own for, to read as its twin does."""
    block = 4 * KIB
    below = base(image).read_bytes() if base(image).exists() else b""
    content = twin.read_bytes()
    result = 0
    for offset in range(0, len(content), block):
        mine = content[offset : offset + block]
        result += block * (mine != bytes(len(mine)) and mine != below[offset : offset + block])
    return result


def assert_nothing_leaked(image: Path) -> None:
    """For QEMU: exit code 0, which excludes leaks; and for us."""
    with image.open("rb") as file:
        cluster = int.from_bytes(file.read(8)[4:], "little")
    assert image.stat().st_size // cluster < cluster - 1, "QEMU would count leaks that are none"
    done = subprocess.run(["qemu-img", "check", "-f", "qed", str(image)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    ours = qedfuse("check", image)
    assert ours.code == 0, ours


def assert_reads_as(image: Path, expected: Path) -> None:
    """QEMU reads the content of a raw file in it."""
    words = ["qemu-img", "compare", "-f", "raw", "-F", "qed", str(expected), str(image)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def flattened(image: Path) -> Path:
    """The same disk as a raw file, by QEMU."""
    flat = image.with_suffix(".flat")
    run("qemu-img", "convert", "-f", "qed", "-O", "raw", image, flat)
    return flat


def fill(path: Path, offset: int, size: int, *, seed: int = 1) -> None:
    """Random data, durable."""
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), random.Random(seed).randbytes(size), offset)
        os.fsync(file.fileno())
