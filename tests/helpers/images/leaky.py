"""Real images from which references are dropped: what they led to is leaked."""

from __future__ import annotations

import json
import random
import struct
from array import array
from pathlib import Path

from qedfuse.qed.header import HEADER_BYTES, Header
from tests.helpers.images.check_images import header_of
from tests.helpers.judges.check_tools import cli, qemu_check
from tests.helpers.qemu.cli import tool


def header(path: Path) -> Header:
    with path.open("rb") as file:
        return header_of(file.read(HEADER_BYTES))


def tables_of(path: Path) -> tuple[array[int], dict[int, array[int]]]:
    """The L1 table, and the L2 table of each index in it that is used. For images with small tables."""
    head = header(path)
    size = head.geometry.table_bytes
    with path.open("rb") as file:
        file.seek(head.l1_table_offset)
        l1 = array("Q", file.read(size))
        tables = {}
        for index, offset in enumerate(l1):
            if offset:
                file.seek(offset)
                tables[index] = array("Q", file.read(size))
    return l1, tables


def drop(path: Path, rng: random.Random, part: float, *, tables: int = 0) -> int:
    """Drop each reference to data with a chance of `part`, and of the L2 tables this many, with all that they map.
    Returns how many clusters are leaked by that."""
    head = header(path)
    l1, found = tables_of(path)
    leaked = 0
    with path.open("r+b") as file:
        for index in rng.sample(sorted(found), tables):
            file.seek(head.l1_table_offset + 8 * index)
            file.write(bytes(8))
            leaked += head.table_size + sum(value > 1 for value in found.pop(index))
        for index, entries in found.items():
            for number, value in enumerate(entries):
                if value > 1 and rng.random() < part:
                    file.seek(l1[index] + 8 * number)
                    file.write(struct.pack("<Q", rng.choice((0, 1))))
                    leaked += 1
    return leaked


def swap_l1_to_the_end(path: Path) -> int:
    """Let the L1 table be the last thing in the file. Returns how many clusters are leaked by that."""
    head = header(path)
    end = path.stat().st_size
    assert end % head.cluster_size == 0
    with path.open("r+b") as file:
        file.seek(head.l1_table_offset)
        table = file.read(head.geometry.table_bytes)
        file.seek(end)
        file.write(table)
        file.seek(40)
        file.write(struct.pack("<Q", end))
    return head.table_size


def expect_cured(path: Path, leaks: int, copy: Path, *, phantoms: int = 0) -> None:
    """From the same number of leaks that QEMU finds to none, with the contents of `copy`, its raw disk."""
    size, head = path.stat().st_size, header(path)
    code, theirs = qemu_check(path)
    assert (code, theirs["leaks"]) == (3, leaks + phantoms)
    done = cli("--output=json", path)
    assert (done.returncode, json.loads(done.stdout)["leaks"]) == (3, leaks)
    done = cli("-r", "leaks", path)
    assert done.returncode == 0, done.stderr
    assert f"given back: {leaks} leaked cluster" in done.stdout and "no errors" in done.stdout
    assert path.stat().st_size == size - leaks * head.cluster_size
    code, theirs = qemu_check(path)
    if not phantoms:
        assert (code, theirs.get("leaks", 0)) == (0, 0)
    assert "corruptions" not in theirs
    tool("qemu-img", "compare", "-f", "qed", "-F", "raw", path, copy)
    before = path.stat()
    assert cli("-r", "leaks", path).returncode == cli(path).returncode == 0
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def flat(path: Path) -> Path:
    copy = path.with_suffix(".flat")
    tool("qemu-img", "convert", "-f", "qed", "-O", "raw", path, copy)
    return copy
