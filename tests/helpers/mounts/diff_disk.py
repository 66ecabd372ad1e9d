"""Images of all kinds for the differential test: drawn at random, made by QEMU wherever it can."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.judges.parts import PAGE
from tests.helpers.judges.shadow import SECTOR
from tests.helpers.mounts.guests import run
from tests.helpers.qemu.cli import qedfuse

KIB, MIB = 1 << 10, 1 << 20

#: Cluster size and table size. QEMU opens none of the last kind.
_GEOMETRIES = (
    *((4 * KIB, 2), (4 * KIB, 4), (4 * KIB, 16), (16 * KIB, 2), (64 * KIB, 2), (64 * KIB, 4), (64 * KIB, 16)),
    *((2 * MIB, 2), (2 * MIB, 4)),
    *((4 * KIB, 1), (64 * KIB, 1), (2 * MIB, 1)),
)
_BASES = ("", "", "raw", "raw", "raw", "qcow2", "qcow2-compressed", "qed", "qed", "qed-chain")


@dataclass(frozen=True)
class Disk:
    """`below`: the base. `tail`: where the part begins whose size may change; `capacity`: to where it may. Bytes."""

    image: Path
    below: Path | None
    cluster: int
    table: int
    base: str
    base_size: int
    size: int
    tail: int
    capacity: int

    @property
    def qemu(self) -> bool:
        """Whether QEMU can be the judge."""
        return self.table > 1

    def __str__(self) -> str:
        return f"clusters of {self.cluster}, tables of {self.table}, {self.size} bytes, the tail at {self.tail}, " + (
            f"over {self.base} of {self.base_size}" if self.base else "no base"
        )


def new_disk(directory: Path, rnd: random.Random) -> Disk:
    """An image `disk.qed` in `directory`, what it refers to there, too, or in `directory/below`."""
    cluster, table = rnd.choice(_GEOMETRIES)
    base = rnd.choice(_BASES)
    tail = rnd.randrange(1 * MIB, 6 * MIB) // PAGE * PAGE
    size = tail + rnd.randrange(512 * KIB) // SECTOR * SECTOR
    base_size = 0
    backing: list[str] = []
    lower: Path | None = None
    if base:
        below = directory / rnd.choice((".", ".", "below"))
        below.mkdir(exist_ok=True)
        base_size = rnd.choice((rnd.randrange(size // 4, size), rnd.randrange(size, size * 5 // 4)))
        base_size -= base_size % SECTOR
        if base == "raw":
            base_size += rnd.choice((0, 1, -1, 100, 511, -200))
        lower, kind = _new_base(below, rnd, base, base_size)
        backing = ["-b", str(lower), "-F", kind]
    image = directory / "disk.qed"
    options = ["-o", f"cluster_size={cluster},table_size={table}", *backing, str(image), str(size)]
    if table > 1:
        run("qemu-img", "create", "-q", "-f", "qed", *options)
        _fill(image, rnd, size)
    else:
        done = qedfuse("create", *options)
        assert done.code == 0, done
    capacity = size + rnd.randrange(64 * KIB, 2 * MIB) // SECTOR * SECTOR
    return Disk(image, lower, cluster, table, base, base_size, size, tail, capacity)


def _new_base(below: Path, rnd: random.Random, base: str, size: int) -> tuple[Path, str]:
    """A backing file with data and holes, of the kind `base`."""
    raw = below / "base.raw"
    with raw.open("wb") as file:
        file.truncate(size)
        for start in range(0, size, 40 * KIB):
            if rnd.random() < 0.6:
                file.seek(start)
                file.write(rnd.randbytes(min(40 * KIB, size - start)))
    if base == "raw":
        return raw, "raw"
    if base.startswith("qcow2"):
        words = ["-c"] if base == "qcow2-compressed" else []
        run("qemu-img", "convert", "-O", "qcow2", *words, raw, below / "base.qcow2")
        return below / "base.qcow2", "qcow2"
    upper = below / "base.qed"
    if base == "qed":
        run("qemu-img", "convert", "-O", "qed", "-o", "cluster_size=4k", raw, upper)
    else:
        run("qemu-img", "create", "-q", "-f", "qed", "-b", raw, "-F", "raw", upper, str(size))
        _fill(upper, rnd, size)
    return upper, "qed"


def _fill(image: Path, rnd: random.Random, size: int) -> None:
    """Some writes and zeroes by QEMU, small ones: its qed driver miscounts the clusters of large ones."""
    if rnd.random() < 0.7:
        qemu_writes(image, rnd, size, SECTOR)


def qemu_writes(image: Path, rnd: random.Random, size: int, align: int) -> list[tuple[int, bytes]]:
    """QEMU writes to an image. Returns what it wrote: offset and data, multiples of `align`.

    That should be the cluster size if the image has a base and it matters what is written: QEMU (7.2) fills the rest of
    a zero cluster that it writes to from the base.
    """
    result = []
    commands = []
    for _ in range(rnd.randrange(1, 12)):
        length = -(-rnd.choice((SECTOR, PAGE, 64 * KIB, 200 * KIB)) // align) * align
        if length > size:
            continue
        offset = rnd.randrange(size - length + 1) // align * align
        if rnd.random() < 0.3:
            value, command = 0, f"write -z {offset} {length}"
        else:
            value = rnd.randrange(1, 256)
            command = f"write -P {value} {offset} {length}"
        commands += ["-c", command]
        result.append((offset, bytes([value]) * length))
    if commands:
        said = run("qemu-io", "-f", "qed", *commands, image)
        assert "failed" not in said, said
    return result


def new_model(disk: Disk, path: Path) -> None:
    """A file that holds what the disk reads as, and zeroes to its capacity."""
    if disk.qemu:
        run("qemu-img", "convert", "-f", "qed", "-O", "raw", disk.image, path)
    elif disk.below:
        run("qemu-img", "convert", "-f", disk.below.suffix[1:], "-O", "raw", disk.below, path)
    with path.open("ab") as file:
        file.truncate(disk.size)
        file.truncate(disk.capacity)
