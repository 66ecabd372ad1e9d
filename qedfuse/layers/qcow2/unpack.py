"""Compressed clusters, unpacked.

Source: QEMU docs/interop/qcow2, "Compressed Clusters Descriptor".
"""

from __future__ import annotations

import trio

from qedfuse.errors import CorruptError
from qedfuse.host.storage import ReadStorage, read
from qedfuse.layers.qcow2.entries import compressed_extent, inflate
from qedfuse.layers.qcow2.header import Qcow2Header

#: A cluster up to this size is unpacked inline, a larger one in a worker thread.
INLINE_UNPACK_LIMIT = 64 << 10


async def unpack(storage: ReadStorage, header: Qcow2Header, entry: int, position: int, file_size: int) -> bytes:
    """The whole cluster of a compressed L2 `entry`, which maps guest `position`. Raises CorruptError, OSError."""
    cluster_size = header.cluster_size
    host, size = compressed_extent(entry, header.cluster_bits)
    size = min(size, file_size - host)  # the last sector may be cut
    raw = await read(storage, host, size) if size > 0 else b""
    if cluster_size <= INLINE_UNPACK_LIMIT:
        data = inflate(raw, cluster_size)
    else:
        data = await trio.to_thread.run_sync(inflate, raw, cluster_size)
    if data is None:
        raise CorruptError(
            storage.path, f"the compressed cluster of guest offset {position} (at {host:#x}) cannot be decompressed"
        )
    return data
