"""A new image in a file: a header, the backing file's name, an empty L1 table. Laid out as QEMU does, byte for byte.

    offset 0             the header (64 bytes), then the backing file's name
    one cluster          the L1 table, all zeroes; the file ends behind it

The order of writes: the old content goes, durably; the name and the (sparse) table come, durably; then the header.
After a crash the file is the old image, no image, or the whole new one, and never a mixture.

Source: QEMU docs/interop/qed_spec, "Header", and what qemu-img writes.
"""

from __future__ import annotations

import errno

from qedfuse.errors import QedfuseError
from qedfuse.host.storage import Storage
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import Header
from qedfuse.sizes import SECTOR_SIZE, round_up


def new_header(
    path: str, size: int, geometry: Geometry, backing_name: bytes = b"", *, backing_is_raw: bool = False
) -> Header:
    """The header of a new image of `size` bytes, rounded up to 512. Pure.

    Raises QedfuseError: the geometry cannot map so much, or the name does not fit into the header's one cluster.
    """
    header = Header(
        cluster_size=geometry.cluster_size,
        table_size=geometry.table_size,
        header_size=1,
        features=0,
        compat_features=0,
        autoclear_features=0,
        l1_table_offset=geometry.cluster_size,
        image_size=round_up(size, SECTOR_SIZE),
    )
    if backing_name:
        offset = header.room_for_name(len(backing_name), path)
        header = header.with_backing_file(offset, len(backing_name), is_raw=backing_is_raw)
    if header.image_size > geometry.max_image_size:
        raise QedfuseError(
            path,
            f"size {size} is over {geometry.max_image_size}, all that cluster_size={geometry.cluster_size},"
            f"table_size={geometry.table_size} can map; use larger ones",
            errno.EFBIG,
        )
    return header


def qemu_objection(geometry: Geometry, image_size: int) -> str | None:
    """Why QEMU cannot open such an image, valid though it is; None if it can.

    Source: QEMU 7.2 and 10.0, observed. Its largest size for a geometry is computed in 64 bits and overflows to 0.
    """
    if geometry.table_size == 1:
        return "table_size=1"
    if geometry.table_entries**2 * geometry.cluster_size >= 1 << 64 and image_size:
        sizes = f"cluster_size={geometry.cluster_size},table_size={geometry.table_size}"
        return f"{sizes}, of which it miscounts the maximum"
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
