"""Making an image: a header, the backing file's name, an empty L1 table. Laid out as QEMU does, byte for byte.

    offset 0             the header (64 bytes), then the backing file's name
    one cluster          the L1 table, all zeroes; the file ends behind it

The order of writes: the old content goes, durably; the name and the (sparse) table come, durably; then the header.
After a crash the file is the old image, no image, or the whole new one, and never a mixture.

Source: QEMU docs/interop/qed_spec, "Header", and what qemu-img writes.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

import trio

from qedfuse.chain.chain import open_backing
from qedfuse.errors import QedfuseError, UsageError
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.image_lock import lock
from qedfuse.host.output_file import make_file, sync_directory
from qedfuse.host.storage import Storage
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import (
    FEATURE_BACKING_FILE,
    FEATURE_BACKING_FORMAT_NO_PROBE,
    HEADER_BYTES,
    MAX_BACKING_NAME,
    Header,
)
from qedfuse.sizes import SECTOR_SIZE, round_up


def new_header(
    path: str, size: int, geometry: Geometry, backing_name: bytes = b"", *, backing_is_raw: bool = False
) -> Header:
    """The header of a new image of `size` bytes, rounded up to 512. Pure.

    Raises QedfuseError: the geometry cannot map so much, or the name does not fit into the header's one cluster.
    """
    room = min(geometry.cluster_size - HEADER_BYTES, MAX_BACKING_NAME)
    if len(backing_name) > room:
        raise QedfuseError(
            path,
            f"the backing file's name has {len(backing_name)} bytes; the header has room for {room}",
            errno.ENAMETOOLONG,
        )
    if round_up(size, SECTOR_SIZE) > geometry.max_image_size:
        raise QedfuseError(
            path,
            f"size {size} is over {geometry.max_image_size}, all that cluster_size={geometry.cluster_size},"
            f"table_size={geometry.table_size} can map; use larger ones",
            errno.EFBIG,
        )
    features = 0
    if backing_name:
        features = FEATURE_BACKING_FILE | (FEATURE_BACKING_FORMAT_NO_PROBE if backing_is_raw else 0)
    return Header(
        cluster_size=geometry.cluster_size,
        table_size=geometry.table_size,
        header_size=1,
        features=features,
        compat_features=0,
        autoclear_features=0,
        l1_table_offset=geometry.cluster_size,
        image_size=round_up(size, SECTOR_SIZE),
        backing_filename_offset=HEADER_BYTES if backing_name else 0,
        backing_filename_size=len(backing_name),
    )


def qemu_objection(header: Header) -> str | None:
    """Why QEMU cannot open such an image, valid though it is; None if it can.

    Source: QEMU 7.2 and 10.0, observed. Its largest size for a geometry is computed in 64 bits and overflows to 0.
    """
    if header.table_size == 1:
        return "table_size=1"
    if header.geometry.table_entries**2 * header.cluster_size >= 1 << 64 and header.image_size:
        return f"cluster_size={header.cluster_size},table_size={header.table_size}, of which it miscounts the maximum"
    return None


async def write_image(storage: Storage, header: Header, backing_name: bytes = b"") -> None:
    """Make the file an empty image, whatever it held; durable on return. Raises OSError.

    Cancelled or failed, it leaves a file that is no image, or the old one.
    """
    if storage.size():
        await storage.truncate(0)
        await storage.sync()
    await storage.truncate(header.l1_table_offset + header.geometry.table_bytes)
    if backing_name:
        await storage.write(header.backing_filename_offset, [backing_name])
    await storage.sync()
    await storage.write(0, [header.encode()])
    await storage.sync()


async def create_image(
    path: str,
    size: int | None = None,
    *,
    geometry: Geometry | None = None,
    backing: str | None = None,
    backing_format: str | None = None,
) -> tuple[Header, str | None]:
    """Create an image at `path`, over whatever file is there unless somebody uses it; durable on return.

    `size` in bytes is rounded up to 512; without it, it is the backing file's. `backing` is stored as it is, and a
    relative name is relative to the new image's directory. `backing_format` is raw, qed or qcow2; without it, it is
    probed, once: a raw file is marked so, and never probed again.

    Returns the new header and the backing file's format. Raises UsageError, InUseError (a process has the file open),
    QedfuseError, OSError; nothing is touched before the arguments are known to be good.
    """
    geometry = geometry or Geometry()
    if backing is None:
        if size is None:
            raise UsageError(path, "a size is needed (or a backing file to take it from)")
        header = new_header(path, size, geometry)
    else:
        below, backing_format = await _look_at_backing(path, backing, backing_format)
        is_raw = backing_format == "raw"
        header = new_header(
            path, below if size is None else size, geometry, os.fsencode(backing), backing_is_raw=is_raw
        )
    await _write_file(path, header, os.fsencode(backing or ""))
    return header, backing_format


async def _write_file(path: str, header: Header, backing_name: bytes) -> None:
    """`write_image` on a host file, new or not. A new one is gone again if that fails."""
    new_path = make_file(path)
    storage = FileStorage.open(path, writable=True)
    try:
        if storage.fixed:
            raise QedfuseError(path, "is a block device, and a new qed image must be a regular file", errno.EINVAL)
        lock(storage.fileno(), path, writable=True)
        try:
            await write_image(storage, header, backing_name)
            if new_path:
                await trio.to_thread.run_sync(sync_directory, os.path.dirname(new_path))
        except BaseException:
            if new_path:
                with suppress(OSError):
                    os.unlink(new_path)
            raise
    except OSError as error:
        error.filename = error.filename or path  # a full disk has none
        raise
    finally:
        await storage.close()


async def _look_at_backing(path: str, backing: str, backing_format: str | None) -> tuple[int, str]:
    """The size and format of the backing file, which must be there; neither it nor one below it may be the new image.

    Nothing is locked: only the headers are read.
    """
    if not backing:
        raise UsageError(path, "the backing file's name is empty")
    layer = await open_backing(path, backing, backing_format, share=True)
    try:
        return layer.size, layer.format
    finally:
        await layer.close()
