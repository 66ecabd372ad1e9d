"""What an image is: its header, its backing file's name, its size on the host. Opens nothing else.

It opens the file by itself: a look at a header needs no event loop, and loading one takes longer than the look. What
needs the engine (a backing chain, a check) is imported where it is used.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qedfuse.errors import CorruptError, UnsupportedError
from qedfuse.host.image_lock import lock
from qedfuse.host.storage import check_type
from qedfuse.qed.header import (
    FEATURE_BACKING_FILE,
    FEATURE_BACKING_FORMAT_NO_PROBE,
    FEATURE_NEED_CHECK,
    HEADER_BYTES,
    Header,
)
from qedfuse.sizes import SECTOR_SIZE, round_up
from qedfuse.text import decode_backing_name

if TYPE_CHECKING:
    from qedfuse.chain.backing import BackingPolicy
    from qedfuse.layers.layer import Layer
    from qedfuse.layers.qcow2.header import Qcow2Header

#: An untrusted image may declare at most this many bytes: what the default geometry can map.
DEFAULT_MAX_SIZE = 64 << 40
#: And its structure must be checked in this many seconds.
DEFAULT_TIME_LIMIT = 10.0

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
    a block device, as in qemu-img), `file_size` how long the file is.
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
    with _opened(path, share=share) as fd:
        return _read_info(fd, path)


def read_untrusted(
    path: str, *, share: bool = False, max_size: int = DEFAULT_MAX_SIZE, time_limit: float = DEFAULT_TIME_LIMIT
) -> ImageInfo:
    """As `read_info`, for an image from somebody who may mean harm: it must be consistent and stand alone.

    Opens nothing but the image; memory is bounded by the check, time by `time_limit` (seconds). Raises UnsupportedError
    for an image that refers to another file, declares more than `max_size` bytes, takes too long to check or is one of
    another format, too (whose reader would see something else), and CorruptError for one whose tables are not in order
    (leaked clusters are harmless) or that was not closed cleanly.
    """
    from qedfuse.chain.probe import PROBE_BYTES, other_format

    deadline = time.monotonic() + time_limit
    with _opened(path, share=share) as fd:
        info = _read_info(fd, path)
        if info.backing_name is not None:
            raise UnsupportedError(path, f"not to be trusted: it refers to another file, {info.backing_name!r}")
        other = other_format(_pread(fd, path, PROBE_BYTES, 0))
        if other is not None:
            raise UnsupportedError(path, f"not to be trusted: it looks like a {other} image, too")
        if info.virtual_size > max_size:
            raise UnsupportedError(
                path, f"not to be trusted: it declares {info.virtual_size} bytes, more than {max_size} (--max-size)"
            )
        assert info.header is not None
        if info.header.needs_check:
            raise CorruptError(path, "not to be trusted: it was not closed cleanly; see qedfuse check -r all")
        _check(fd, path, info.header, deadline)
        return info


@contextmanager
def _opened(path: str, *, share: bool) -> Iterator[int]:
    """The image's descriptor, open for reading and locked unless `share`. Never blocks on a FIFO."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        check_type(path, os.fstat(fd).st_mode)
        if not share:
            lock(fd, path, writable=False)
        yield fd
    finally:
        os.close(fd)


def _read_info(fd: int, path: str) -> ImageInfo:
    size = os.lseek(fd, 0, os.SEEK_END)
    header = Header.decode(_pread(fd, path, HEADER_BYTES, 0), path)
    header.validate_file_size(size, path)
    name = None
    if header.has_backing_file:
        raw = _pread(fd, path, header.backing_filename_size, header.backing_filename_offset)
        name = decode_backing_name(raw, path)
    return _of_qed(path, header, os.fstat(fd), size, name)


def _of_qed(path: str, header: Header, status: os.stat_result, size: int, backing_name: str | None) -> ImageInfo:
    return ImageInfo(
        path,
        "qed",
        header.image_size,
        status.st_blocks * 512,
        size,
        header,
        backing_name,
        "raw" if header.backing_is_raw else None,
        header.cluster_size,
        on_device=stat.S_ISBLK(status.st_mode),
    )


def _pread(fd: int, path: str, size: int, offset: int) -> bytes:
    try:
        return os.pread(fd, size, offset)
    except OSError as error:
        error.filename = path
        raise


def _check(fd: int, path: str, header: Header, deadline: float) -> None:
    """The structural check of `read_untrusted`."""
    import trio

    from qedfuse.check.check import CheckResult, check_image
    from qedfuse.host.file_storage import FileStorage

    async def run() -> CheckResult:
        storage = FileStorage(path, os.dup(fd), writable=False)
        try:
            with trio.fail_after(max(0.0, deadline - time.monotonic())):
                return await check_image(storage, header)
        finally:
            await storage.close()

    try:
        result = trio.run(run)
    except trio.TooSlowError:
        raise UnsupportedError(path, "not to be trusted: its tables take too long to check") from None
    if result.corruptions or result.check_errors:
        raise CorruptError(path, f"not to be trusted: its tables are corrupt ({result.problems[0]})")


async def read_chain(path: str, *, share: bool = False, policy: BackingPolicy | None = None) -> list[ImageInfo]:
    """The image and every file below it, top first. Opens the whole chain; see `chain.open_layer` for the errors."""
    from qedfuse.chain.backing import ANY_BACKING
    from qedfuse.chain.chain import open_layer

    top = await open_layer(path, "qed", share=share, policy=policy or ANY_BACKING)
    try:
        infos: list[ImageInfo] = []
        layer: Layer | None = top
        while layer is not None:
            infos.append(await _layer_info(layer))
            layer = layer.backing
        return infos
    finally:
        await top.close()


async def _layer_info(layer: Layer) -> ImageInfo:
    from qedfuse.chain.chain import read_backing_name
    from qedfuse.layers.qcow2.layer import Qcow2Layer
    from qedfuse.qed.image import Image

    status, file_size = layer.storage.stat(), layer.storage.size()
    if isinstance(layer, Image):
        name = await read_backing_name(layer.storage, layer.header)
        return _of_qed(layer.path, layer.header, status, file_size, name)
    on_device = layer.storage.fixed
    info = ImageInfo(layer.path, layer.format, layer.size, status.st_blocks * 512, file_size, on_device=on_device)
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
