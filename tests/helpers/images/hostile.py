"""How the crafted QED images of `corpus.py` are made.

Each case builds its files in an empty directory and says what the commands make of it. All files are sparse and small
on the disk; the largest ones need a file system that takes them (`EXABYTES`: a tmpfs).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qedfuse.qed.header import HEADER_BYTES, Header
from qedfuse.sizes import MAX_OFFSET

C = 4096  # the cluster size, unless a case says otherwise
TABLE = 2 * C
ENTRIES = TABLE // 8
COVERAGE = ENTRIES * C
GIANT = 64 << 20
TOP = (1 << 64) - 1
#: The largest file of ext4, of any file system, and a size between the two.
EXT4 = (16 << 40) - C
EXABYTES = (1 << 63) - 1
TERABYTES = 15 << 40

#: Where things are in `good`: clusters of the file.
L1, L2, DATA, CLUSTERS = 1, 3, 5, 9

Pieces = Mapping[int, bytes]
Build = Callable[[Path], Path]


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def entries(where: Mapping[int, int], size: int = TABLE) -> bytes:
    """A table with some entries."""
    table = bytearray(size)
    for index, value in where.items():
        struct.pack_into("<Q", table, 8 * index, value)
    return bytes(table)


GOOD = Header(
    cluster_size=C,
    table_size=2,
    header_size=1,
    features=0,
    compat_features=0,
    autoclear_features=0,
    l1_table_offset=L1 * C,
    image_size=3 * COVERAGE,
)
#: L2 entries of `good`: index -> cluster.
MAPPED = {0: DATA, 1: DATA + 1, 512: DATA + 2, 1023: DATA + 3}


def save(path: Path, head: bytes, pieces: Pieces, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, piece in {0: head, **pieces}.items():
            file.seek(offset)
            file.write(piece)
        file.truncate(size)
    return path


def good(
    l1: Mapping[int, int] | None = None,
    l2: Mapping[int, int] | None = None,
    more: Pieces | None = None,
    size: int = CLUSTERS * C,
    **fields: int,
) -> Build:
    """A sound image of 9 clusters (header, L1, one L2 table, 4 of data), but for what the arguments change in it.

    `l1`, `l2`: entries, added to those that are there. `more`: other bytes. `fields`: of the header.
    """

    def build(directory: Path) -> Path:
        header = replace(GOOD, **fields)
        pieces = {
            L1 * C: entries({0: L2 * C} | dict(l1 or {})),
            L2 * C: entries({index: cluster * C for index, cluster in MAPPED.items()} | {2: 1} | dict(l2 or {})),
            **{cluster * C: bytes([0x40 + cluster]) * C for cluster in MAPPED.values()},
            **(more or {}),
        }
        head = header.encode()
        return save(directory / "image.qed", head, {at: piece for at, piece in pieces.items() if at < size}, size)

    return build


def raw(content: bytes) -> Build:
    """Any bytes."""
    return lambda directory: save(directory / "image.qed", content, {}, len(content))


def patched(offset: int, value: bytes, build: Build | None = None) -> Build:
    """`good` with other bytes in one place of it."""

    def patch(directory: Path) -> Path:
        path = (build or good())(directory)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(value)
        return path

    return patch


def over(name: bytes, *, offset: int = HEADER_BYTES, size: int | None = None, features: int = 1, **more: int) -> Build:
    """`good` with a backing file of that name. `size`: what the header says of its length."""
    more |= {"backing_filename_offset": offset, "backing_filename_size": len(name) if size is None else size}
    place = offset if offset < C else HEADER_BYTES
    return good(None, None, {place: name}, CLUSTERS * C, features=features, **more)


def chain(images: int, *, loop: bool = False) -> Build:
    """`images` images, each over the next; the last one over the first one, or over nothing."""

    def build(directory: Path) -> Path:
        for number in range(images):
            last = number == images - 1
            name = b"image.qed" if last and loop else b"" if last else b"%d.qed" % number
            target = (over(name) if name else good())(directory)
            if number:
                target.rename(directory / f"{number - 1}.next")
            else:
                target.rename(directory / "top")
        for path in directory.glob("*.next"):
            path.rename(path.with_suffix(".qed"))
        return (directory / "top").rename(directory / "image.qed")

    return build


def linked_to_itself(directory: Path) -> Path:
    (directory / "other.qed").symlink_to("image.qed")
    return over(b"other.qed")(directory)


def wide(l1: Iterable[int], table: Iterable[int], *, clusters: int = 40, **fields: int) -> Build:
    """An image with tables of 16 clusters (8192 entries): L1 in cluster 1, an L2 table in 17, data in 33 and more."""

    def build(directory: Path) -> Path:
        header = replace(GOOD, table_size=16, image_size=8192 * 8192 * C)
        pieces = {C: words(*l1), 17 * C: words(*table), 34 * C: b"data" * 1024}
        return save(directory / "image.qed", replace(header, **fields).encode(), pieces, clusters * C)

    return build


def giant(l1: Iterable[int], *, clusters: int, more: Pieces | None = None, **fields: int) -> Build:
    """An image of 8 EiB with the largest tables: 16 clusters of 64 MiB each. L1 is in cluster 1; `l1`: its entries."""

    def build(directory: Path) -> Path:
        header = Header(GIANT, 16, 1, 0, 0, 0, GIANT, MAX_OFFSET)
        head = replace(header, **fields).encode()
        return save(directory / "image.qed", head, {GIANT: words(*l1), **(more or {})}, clusters * GIANT)

    return build


@dataclass(frozen=True)
class Case:
    """What the commands make of an image.

    `info`, `untrusted`, `opens`: words of the one line with which `info`, `info --untrusted`, and whatever opens the
    chain, refuse it; "" where they do not. `check`, `repaired`: exit codes of `check` and of `check -r all`; `says`:
    words of the line with which they fail. `long`: to map all of it takes hours. `size`: the file's, if it is huge.
    """

    name: str
    build: Build
    info: str = ""
    untrusted: str = ""
    opens: str = ""
    check: int = 0
    repaired: int = 0
    says: str = ""
    long: bool = False
    size: int = 0
