"""Whether a qcow2 image was preallocated, from its reference counts.

With preallocation=metadata every cluster has its place in a file that is one large hole. QEMU looks for the host's
holes inside mapped clusters then, and only then: it takes an image for such a one if notably more clusters are in use
than the file holds. `map` does the same.

Source: QEMU docs/interop/qcow2, "Host cluster management"; the threshold as observed.
"""

from __future__ import annotations

from qedfuse.errors import CorruptError
from qedfuse.host.chunks import TableChunks
from qedfuse.host.storage import ReadStorage, held_bytes
from qedfuse.host.waiting import Breather
from qedfuse.layers.qcow2.header import Qcow2Header
from qedfuse.sizes import ENTRY_SIZE, round_down, round_up

#: Blocks of reference counts that are looked at: enough for 128 TiB, and an end for a hostile image.
_MAX_BLOCKS = 1 << 16


async def is_preallocated(storage: ReadStorage, header: Qcow2Header) -> bool:
    """Whether the image's mapped clusters may be holes of the host. False if its reference counts make no sense.

    Raises OSError. Takes time as the file's size, at most some seconds.
    """
    if storage.fixed or not header.refcount_bits:
        return False
    size = header.cluster_size
    held = held_bytes(storage) // size
    threshold = max(held * 10 // 9, held + 2)
    clusters = -(-storage.size() // size)
    if clusters < threshold:
        return False
    per_block = size * 8 // header.refcount_bits
    blocks = min(-(-clusters // per_block), header.refcount_table_clusters * size // ENTRY_SIZE, _MAX_BLOCKS)
    used = 0
    breathe = Breather()
    try:
        async for position, chunk in _chunks(storage, header.refcount_table_offset, blocks * ENTRY_SIZE, breathe):
            for place in range(0, len(chunk), ENTRY_SIZE):
                offset = int.from_bytes(chunk[place : place + ENTRY_SIZE], "big")
                number = (position + place) // ENTRY_SIZE
                if offset == 0 or number >= blocks:
                    continue
                if offset % size:
                    return False
                rest = min(per_block, clusters - number * per_block)
                async for _start, part in _chunks(storage, offset, -(-rest * header.refcount_bits // 8), breathe):
                    used += _count(part, header.refcount_bits)
                    if used >= threshold:
                        return True
    except CorruptError:
        return False
    return False


def _chunks(storage: ReadStorage, offset: int, size: int, breathe: Breather) -> TableChunks:
    """See `TableChunks`. Raises CorruptError for what does not lie inside the file."""
    end = round_down(storage.size(), ENTRY_SIZE)
    if offset >= end or offset % ENTRY_SIZE:
        raise CorruptError(storage.path, f"reference counts lie at {offset:#x}, which is no place for them")
    return TableChunks(storage, offset, min(round_up(size, ENTRY_SIZE), end - offset), breathe)


def _count(part: bytes | bytearray, bits: int) -> int:
    """How many numbers of `bits` bits are not zero."""
    if bits < 8:
        mask = (1 << bits) - 1
        fields = bytes(sum(1 for shift in range(0, 8, bits) if byte >> shift & mask) for byte in range(256))
        return sum(bytes(part).translate(fields))
    step = bits // 8
    whole = len(part) // step * step
    return sum(map(any, zip(*(part[start:whole:step] for start in range(step)), strict=True)))
