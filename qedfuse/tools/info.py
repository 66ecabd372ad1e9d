"""What an image is: its header, its backing file's name, its size on the host. Opens nothing else.

A look at a header needs no event loop, and loading one takes longer than the look. What needs the engine (a backing
chain) is imported where it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qedfuse.chain.policy import ANY_BACKING, BackingPolicy
from qedfuse.chain.unfinished import UnfinishedError, describe_unfinished
from qedfuse.host.closing import closing
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.image_lock import lock
from qedfuse.host.reflink import NOT_SHARED, SharedBytes, shared_bytes
from qedfuse.host.storage import ReadStorage
from qedfuse.host.waiting import run_blocking
from qedfuse.qed.header import (
    FEATURE_BACKING_FILE,
    FEATURE_BACKING_FORMAT_NO_PROBE,
    FEATURE_NEED_CHECK,
    Header,
    NotQedError,
)
from qedfuse.qed.header_io import read_backing_name, read_header
from qedfuse.sizes import SECTOR_SIZE, round_up

if TYPE_CHECKING:
    from qedfuse.layers.layer import Layer
    from qedfuse.layers.qcow2.header import Qcow2Header

_FEATURE_NAMES = {
    FEATURE_BACKING_FILE: "backing-file",
    FEATURE_NEED_CHECK: "need-check",
    FEATURE_BACKING_FORMAT_NO_PROBE: "backing-format-no-probe",
}


@dataclass(frozen=True)
class ImageInfo:
    """One image of a chain; sizes in bytes. `header` is for QED and `qcow2` for qcow2 only, a raw file has no
    `cluster_size`.

    `path` is the name it was opened by, `virtual_size` what a guest sees, `actual_size` what it takes on the host (0 on
    a block device, as in qemu-img), `file_size` how long the file is, `shared` how much of it other files have, too.
    `unfinished`: that a conversion in place is under way, for a person.
    """

    path: str
    format: str
    virtual_size: int
    actual_size: int
    file_size: int
    header: Header | None = None
    backing_name: str | None = None
    backing_format: str | None = None
    cluster_size: int | None = None
    qcow2: Qcow2Header | None = None
    on_device: bool = False
    unfinished: str | None = None
    shared: SharedBytes = NOT_SHARED

    @property
    def full_backing_name(self) -> str | None:
        """The backing file's name as seen from here: relative to the image's directory, unless it is no file's name.

        Source: QEMU block.c, "path_has_protocol", "path_combine". What may be opened is for `backing.py` to say.
        """
        if self.backing_name is None:
            return None
        protocol, colon, _rest = self.backing_name.partition(":")
        if colon and "/" not in protocol:
            return self.backing_name
        return os.path.join(os.path.dirname(self.path), self.backing_name)

    def to_json(self) -> dict[str, object]:
        """qemu-img's keys (QAPI `ImageInfo`), and under format-specific ours."""
        result: dict[str, object] = {
            "children": [{"name": "file", "info": self._file_to_json()}],
            "filename": self.path,
            "format": self.format,
            "virtual-size": self.virtual_size,
            "actual-size": self.actual_size,
            "dirty-flag": self.header is not None and self.header.needs_check,
        }
        if self.shared.size:
            result |= {"shared-size": self.shared.size, "shared-size-complete": self.shared.all}
        if self.cluster_size is not None:
            result["cluster-size"] = self.cluster_size
        if self.backing_name is not None:
            result["backing-filename"] = self.backing_name
            result["full-backing-filename"] = self.full_backing_name
            if self.backing_format is not None:
                result["backing-filename-format"] = self.backing_format
        if self.header is not None:
            result["format-specific"] = {"type": "qed", "data": _header_to_json(self.header)}
        if self.qcow2 is not None:
            result["format-specific"] = {"type": "qcow2", "data": _qcow2_to_json(self.qcow2)}
        if self.unfinished is not None:
            result["unfinished-conversion"] = self.unfinished
        return result

    def _file_to_json(self) -> dict[str, object]:
        """What newer QEMU calls the protocol layer."""
        result: dict[str, object] = {
            "children": [],
            "filename": self.path,
            "format": "host_device" if self.on_device else "file",
            "virtual-size": round_up(self.file_size, SECTOR_SIZE),
            "actual-size": self.actual_size,
            "dirty-flag": False,
        }
        if not self.on_device:
            result["format-specific"] = {"type": "file", "data": {}}
        return result


def _header_to_json(header: Header) -> dict[str, object]:
    return {
        "table-size": header.table_size,
        "header-size": header.header_size,
        "l1-table-offset": header.l1_table_offset,
        "features": [name for bit, name in _FEATURE_NAMES.items() if header.features & bit],
        "compat-features": header.compat_features,
        "autoclear-features": header.autoclear_features,
        "max-virtual-size": header.geometry.max_image_size,
    }


def _qcow2_to_json(header: Qcow2Header) -> dict[str, object]:
    """Without what would have kept us from opening it (QAPI `ImageInfoSpecificQCow2`)."""
    data: dict[str, object] = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "compression-type": "zlib",
        "refcount-bits": header.refcount_bits,
    }
    if header.version > 2:
        data |= {"lazy-refcounts": header.lazy_refcounts, "corrupt": False, "extended-l2": False}
    return data


def read_info(path: str, *, share: bool = False) -> ImageInfo:
    """What the image at `path` says of itself. Reads its header and the backing file's name, and blocks for that.

    Unless `share`, an image that another process has open for writing is refused (InUseError). Raises OSError,
    FormatError, UnsupportedError, CorruptError.
    """
    with opened(path, share=share) as storage:
        unfinished = describe_unfinished(storage.fileno(), path)
        try:
            return replace(run_blocking(info_of(storage)), unfinished=unfinished)
        except NotQedError:
            if unfinished is not None:
                raise UnfinishedError(path, unfinished) from None
            raise


@contextmanager
def opened(path: str, *, share: bool) -> Iterator[FileStorage]:
    """The image's file, open for reading and locked unless `share`. Never blocks on a FIFO."""
    storage = FileStorage.open(path, False)
    try:
        if not share:
            lock(storage.fileno(), path, writable=False)
        yield storage
    finally:
        with suppress(OSError):  # it was only read: there is nothing to lose
            run_blocking(storage.close())


async def info_of(storage: ReadStorage, header: Header | None = None) -> ImageInfo:
    """What a QED image says of itself. `header`: if it has been read already."""
    header = header or await read_header(storage)
    name = await read_backing_name(storage, header)
    info = _host_info(storage, "qed", header.image_size)
    backing_format = "raw" if header.backing_is_raw else None
    return replace(
        info, header=header, backing_name=name, backing_format=backing_format, cluster_size=header.cluster_size
    )


def _host_info(storage: ReadStorage, format: str, size: int) -> ImageInfo:
    actual = storage.stat().st_blocks * 512
    shared = shared_bytes(storage.fileno()) if isinstance(storage, FileStorage) and actual else NOT_SHARED
    return ImageInfo(storage.path, format, size, actual, storage.size(), on_device=storage.fixed, shared=shared)


async def read_chain(path: str, *, share: bool = False, policy: BackingPolicy = ANY_BACKING) -> list[ImageInfo]:
    """The image and every file below it, top first. Opens the whole chain; see `chain.open_layer` for the errors."""
    from qedfuse.chain.chain import open_layer
    from qedfuse.layers.layer import layers_of

    async with closing(await open_layer(path, "qed", share=share, policy=policy)) as top:
        return [await _layer_info(layer) for layer in layers_of(top)]


async def _layer_info(layer: Layer) -> ImageInfo:
    from qedfuse.layers.qcow2.layer import Qcow2Layer
    from qedfuse.qed.image import Image

    if isinstance(layer, Image):
        return await info_of(layer.storage, layer.header)
    info = _host_info(layer.storage, layer.format, layer.size)
    if isinstance(layer, Qcow2Layer):
        header = layer.header
        info = replace(
            info,
            backing_name=header.backing_name,
            backing_format=header.backing_format,
            cluster_size=header.cluster_size,
            qcow2=header,
        )
    return info
