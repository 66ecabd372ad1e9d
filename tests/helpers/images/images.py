"""Images on RAM storages: make, open, check, and hand over to the real QEMU."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from qedfuse.chain.recovery import recover
from qedfuse.check.check import Repair, _scan, check_image
from qedfuse.check.gap_filling import _runs_with_data
from qedfuse.check.result import CheckResult
from qedfuse.layers.layer import Layer
from qedfuse.layers.raw import RawLayer
from qedfuse.layers.resolve import read_layer
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import HEADER_BYTES, Header
from qedfuse.qed.image import Image
from qedfuse.qed.new_image import new_header, write_image
from qedfuse.qed.table_pages import PagePool
from tests.helpers.doubles.ram import Chaos, RamFile, RamStorage
from tests.helpers.qemu.cli import tool

TINY = Geometry(4096, 2)  # the smallest that QEMU opens
TINIEST = Geometry(4096, 1)

#: Pools are for the process, not for one image: each reserves address space.
POOL = PagePool()


@dataclass
class Chain:
    """An image in RAM with what lies below it, bottom first: (file, format), none for an image without a backing file.

    `name` is the image's, `name.N` the names of those below it when they are dumped. `others`: what else the image may
    have below it, as `below`, by the name in its header.
    """

    file: RamFile
    below: list[tuple[RamFile, str]]
    others: dict[str, list[tuple[RamFile, str]]] = field(default_factory=dict)

    def under(self, file: RamFile) -> Chain:
        """The chain of `file`, a state of the image: over what its header names, if there is a choice."""
        if not self.others:
            return Chain(file, self.below)
        name = backing_name(file)
        if name in self.others:
            return Chain(file, self.others[name])
        assert name == (f"below{len(self.below) - 1}" if self.below else ""), f"it reads as over {name!r}"
        return Chain(file, self.below)

    def layer_below(self) -> Layer | None:
        """The opened chain below the image, new storages each time."""
        layer: Layer | None = None
        for number, (file, kind) in enumerate(self.below):
            storage = RamStorage(f"below{number}", file, writable=False)
            if kind == "raw":
                layer = RawLayer.open(storage)
            else:
                layer = Image(storage, read_header(file), layer, writable=False, pool=POOL)
        return layer

    def dump(self, directory: Path, name: str = "image.qed", file: RamFile | None = None) -> Path:
        """The chain as real files. `file` stands in for the image's own."""
        for number, (lower, _kind) in enumerate(self.below):
            dump(lower, directory / f"below{number}")
        file = file or self.file
        if self.below and (called := backing_name(file)) != f"below{len(self.below) - 1}":
            (directory / called).unlink(missing_ok=True)
            (directory / called).symlink_to(f"below{len(self.below) - 1}")
        return dump(file, directory / name)


def dump(file: RamFile, path: Path) -> Path:
    with path.open("wb") as target:
        target.truncate(file.size)
        for index, page in file.pages.items():
            if index * 4096 < file.size:
                target.seek(index * 4096)
                target.write(page[: file.size - index * 4096])
    return path


def backing_name(file: RamFile) -> str:
    """What the image's header says; empty: it has no backing file."""
    header = read_header(file)
    if not header.has_backing_file:
        return ""
    return os.fsdecode(file.read(header.backing_filename_offset, header.backing_filename_size))


def read_header(file: RamFile) -> Header:
    return Header.decode(file.read(0, HEADER_BYTES), "ram")


async def new_chain(size: int, geometry: Geometry = TINY, below: list[tuple[RamFile, str]] | None = None) -> Chain:
    """A fresh image over `below`. A QED file in `below` must have been made by this function (for its name)."""
    below = below or []
    name = f"below{len(below) - 1}".encode() if below else b""
    storage = RamStorage("new")
    raw = bool(below) and below[-1][1] == "raw"
    await write_image(storage, new_header("new", size, geometry, name, backing_is_raw=raw), name)
    return Chain(storage.file, below)


def raw_file(content: bytes) -> RamFile:
    file = RamFile()
    file.write(0, content)
    return file


def on_device(file: RamFile, size: int, *, stale: bytes = b"") -> RamFile:
    """An image's file on a block device of `size` bytes, behind which it holds what could pass for a table or data."""
    stale = stale or struct.pack("<Q", 5 * 4096)
    device = RamFile(size=size, fixed=True)
    device.write(0, (stale * (size // len(stale) + 1))[:size])
    device.write(0, file.read(0, file.size))
    return device


async def open_chain(
    chain: Chain,
    storage: RamStorage | None = None,
    *,
    chaos: Chaos | None = None,
    fixed_size: bool = False,
    pool: PagePool | None = None,
) -> Image:
    """Open the image for writing as `opening.open_image` does: repaired if it was not closed cleanly."""
    if storage is None:
        storage = RamStorage("image", chain.file, chaos=chaos)
    header = read_header(storage.file)
    header.validate_file_size(storage.file.size, "ram")
    header = await recover(storage, header)
    return Image(storage, header, chain.layer_below(), writable=True, fixed_size=fixed_size, pool=pool or POOL)


async def repaired(storage: RamStorage, header: Header) -> Header:
    result = await check_image(storage, header, repair=Repair.ALL)
    assert (result.corruptions, result.check_errors) == (0, 0), result.problems
    return result.header


async def checked(file: RamFile) -> CheckResult:
    """What a check that changes nothing finds."""
    return await check_image(RamStorage("image", file, writable=False), read_header(file))


async def assert_sound(file: RamFile, *, leaks: bool = False) -> CheckResult:
    """No corruption, and no leaks either unless they are allowed."""
    result = await checked(file)
    assert result.corruptions == 0 and result.check_errors == 0, result.problems
    assert leaks or result.leaks == 0, result.problems
    return result


async def assert_leaks_are_holes(file: RamFile) -> CheckResult:
    """No corruption, and what leaked holds no data. On a device nothing leaks."""
    result = await assert_sound(file, leaks=not file.fixed)
    if not file.fixed:
        storage = RamStorage("image", file, writable=False)
        header = read_header(file)
        _, used = await _scan(storage, header, None)
        leaks = [run for run in _runs_with_data(storage, header, used) if run[0] < run[1]]
        assert not leaks, "leaked clusters with data"
    return result


async def assert_given_back(file: RamFile) -> None:
    """As opening leaves an image that was not closed: as above, and nothing that leaked is at the end."""
    result = await assert_leaks_are_holes(file)
    assert file.fixed or result.image_end_offset == file.size, "leaked clusters at the end"


async def contents(chain: Chain, file: RamFile | None = None) -> bytes:
    """All that a reader sees, through a fresh read-only image."""
    storage = RamStorage("image", file or chain.file, writable=False)
    image = Image(storage, read_header(storage.file), chain.layer_below(), writable=False, pool=POOL)
    try:
        return bytes(await read_layer(image, 0, image.size))
    finally:
        await image.close()


def assert_qemu_agrees(chain: Chain, expected: bytes, directory: Path, *, leaks: bool) -> None:
    """The real qemu-img finds no corruption (nor leaks) and reads the expected bytes. Not for table_size 1."""
    image = chain.dump(directory)
    tool("qemu-img", "check", "-f", "qed", image, status=(0, 3) if leaks else (0,))
    flat = directory / "flat.raw"
    tool("qemu-img", "convert", "-f", "qed", "-O", "raw", image, flat)
    assert flat.read_bytes() == expected
