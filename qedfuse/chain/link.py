"""One opened image of a chain: what its header says, and what it refers to. Only the header is read."""

from __future__ import annotations

from typing import NamedTuple

from qedfuse.chain.backing import shown
from qedfuse.chain.format_probe import FORMATS, QCOW2, QED, RAW
from qedfuse.errors import UnsupportedError
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.storage import Storage
from qedfuse.layers.layer import Layer
from qedfuse.layers.qcow2.header import Qcow2Header
from qedfuse.layers.qcow2.layer import Qcow2Layer, read_qcow2_header
from qedfuse.layers.raw import RawLayer
from qedfuse.qed.header import Header
from qedfuse.qed.header_io import read_backing_name, read_header
from qedfuse.qed.image import Image


class Reference(NamedTuple):
    """What an image says of its backing file. `format` None: it must be probed."""

    image: str
    name: str
    format: str | None


class Link(NamedTuple):
    """An opened image of a chain; `header` None: raw."""

    storage: FileStorage
    header: Header | Qcow2Header | None

    def make(self, backing: Layer | None) -> Layer:
        if isinstance(self.header, Header):
            return Image(self.storage, self.header, backing, writable=False)
        if isinstance(self.header, Qcow2Header):
            return Qcow2Layer(self.storage, self.header, backing)
        return RawLayer.open(self.storage)


async def read_link(storage: Storage, format: str) -> tuple[Header | Qcow2Header | None, Reference | None]:
    """The header of an image of this format, None if it is raw, and its backing file. Raises FormatError,
    UnsupportedError, CorruptError, OSError."""
    if format == QED:
        qed = await read_header(storage)
        name = await read_backing_name(storage, qed)
        return qed, None if name is None else Reference(storage.path, name, RAW if qed.backing_is_raw else None)
    if format == QCOW2:
        qcow2 = await read_qcow2_header(storage)
        if qcow2.backing_name is None:
            return qcow2, None
        if qcow2.backing_format is not None and qcow2.backing_format not in FORMATS:
            raise UnsupportedError(
                storage.path,
                f"says that its backing file {shown(qcow2.backing_name)} is {shown(qcow2.backing_format)}, "
                f"which qedfuse does not read (only {', '.join(FORMATS)})",
            )
        return qcow2, Reference(storage.path, qcow2.backing_name, qcow2.backing_format)
    if format == RAW:
        return None, None
    raise UnsupportedError(storage.path, f"unknown format {shown(format)} (known are {', '.join(FORMATS)})")
