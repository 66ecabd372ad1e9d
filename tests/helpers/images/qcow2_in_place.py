"""qcow2 images that become QED images where they are: real files, judged by QEMU, and files in RAM, read by us."""

from __future__ import annotations

import shutil
from pathlib import Path

import trio

from qedfuse.chain.unfinished import SUFFIX
from qedfuse.layers.layer import Layer
from qedfuse.layers.qcow2.layer import Qcow2Layer, read_qcow2_header
from qedfuse.layers.raw import RawLayer
from qedfuse.layers.resolve import read_layer
from qedfuse.qed.header import MAGIC
from qedfuse.qed.header_io import read_backing_name
from qedfuse.qed.image import Image
from qedfuse.tools.in_place.apply import InPlace
from qedfuse.tools.in_place.convert import FileConversion
from qedfuse.tools.in_place.plan import Wanted
from qedfuse.tools.in_place.qcow2_to_qed import Qcow2ToQed
from tests.helpers.doubles.image_ram import Ram
from tests.helpers.doubles.ram import RamFile, RamStorage
from tests.helpers.doubles.ram_journal import RamJournal
from tests.helpers.images.images import POOL, raw_file, read_header
from tests.helpers.judges.check_tools import check_file
from tests.helpers.judges.in_place import silent
from tests.helpers.qemu.cli import qemu_img

DEFAULT = Wanted()


def in_ram(storage: Ram, journal: RamJournal) -> InPlace:
    return InPlace(storage, journal, Qcow2ToQed(), "qcow2", "qed")


def convert(image: Path, wanted: Wanted = DEFAULT) -> None:
    """A file. Raises what the conversion raises."""
    trio.run(FileConversion(str(image), source="qcow2", target="qed").run, wanted, silent)


def expect_conversion(image: Path, wanted: Wanted = DEFAULT) -> Path:
    """Convert a file; QEMU finds it sound and the same as before, and so do we. Returns a copy of the old image, of
    which a relative backing file's name leads to the same."""
    before = shutil.copyfile(image, image.with_name(f"before-{image.name}"))
    convert(image, wanted)
    expect_qed(image, before)
    return before


def expect_qed(image: Path, before: Path) -> None:
    """The conversion has come to its end."""
    assert not Path(f"{image}{SUFFIX}").exists()
    qemu_img("check", "-q", "-f", "qed", image)  # no leaks either, or its status is 3
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "qed", before, image)
    found = check_file(image)
    assert (found.corruptions, found.leaks, found.need_check, found.problem_count) == (0, 0, False, 0)


async def open_in_ram(raw: bytes, below: bytes | None = None) -> Layer:
    """An image's bytes, be it qcow2 or QED; `below` is the raw backing file. Raises QedfuseError."""
    backing: Layer | None = None
    if below is not None:
        backing = RawLayer.open(RamStorage("below", raw_file(below), writable=False))
    storage = RamStorage("image", RamFile.of(raw), writable=False)
    if not raw.startswith(MAGIC):
        return await Qcow2Layer.open(storage, backing)
    header = read_header(storage.file)
    header.validate_file_size(storage.file.size, "image")
    return Image(storage, header, backing if header.has_backing_file else None, writable=False, pool=POOL)


async def look(raw: bytes, below: bytes | None = None) -> tuple[bytes, str | None]:
    """What a guest reads of an image, and its backing file's name; see `open_in_ram`. Raises QedfuseError."""
    layer = await open_in_ram(raw, below)
    try:
        if isinstance(layer, Image):
            name = await read_backing_name(layer.storage, layer.header)
        else:
            name = (await read_qcow2_header(layer.storage)).backing_name
        return bytes(await read_layer(layer, 0, layer.size)), name
    finally:
        await layer.close()
