"""How large a conversion's target gets, before it is made.

A cluster is stored if anything in it is not zero, as `convert.py` decides it. So it has to be looked at; but what is
not zero mostly shows at its beginning, and that is all that is read then. (Blocks that are shared with the source are
stored whatever is in them: then the target is longer, up to what it has when all is written.)
"""

from __future__ import annotations

from contextlib import aclosing
from typing import NamedTuple

from qedfuse.chain.chain import open_layer
from qedfuse.chain.policy import ANY_BACKING, BackingPolicy
from qedfuse.host.closing import closing
from qedfuse.host.waiting import Breather
from qedfuse.layers.layer import Layer
from qedfuse.layers.resolve import read_layer_into
from qedfuse.progress import Report
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import Header
from qedfuse.qed.new_image import new_header
from qedfuse.sizes import PAGE_SIZE, SECTOR_SIZE, round_up
from qedfuse.tools.blocks import are_data
from qedfuse.tools.convert_ranges import data_ranges, widened

#: Bytes that are read at once of a cluster that begins with zeroes.
_STEP = 1 << 20


class Measurement(NamedTuple):
    """Bytes of the target's file: with what there is now, and when all of the disk has been written."""

    required: int
    fully_allocated: int


def measure_size(path: str, size: int, target_format: str, geometry: Geometry) -> Measurement:
    """Of a new, empty disk of `size` bytes (rounded up to 512). `path` is for messages. Raises QedfuseError if the
    geometry cannot map so much."""
    if target_format == "raw":
        size = round_up(size, SECTOR_SIZE)
        return Measurement(size, size)
    header = new_header(path, size, geometry)
    clusters = geometry.clusters_for(header.image_size)
    tables = -(-clusters // geometry.table_entries)
    return Measurement(_file_size(header, 0, 0), _file_size(header, tables, clusters))


async def measure_image(
    path: str,
    *,
    source_format: str | None = None,
    target_format: str = "raw",
    geometry: Geometry | None = None,
    share: bool = False,
    policy: BackingPolicy = ANY_BACKING,
    progress: Report | None = None,
) -> Measurement:
    """Of what `convert_image` makes of the disk in `path`, sharing no blocks. Raises what that does for its source."""
    geometry = geometry or Geometry()
    async with closing(await open_layer(path, source_format, share=share, policy=policy)) as top:
        empty = measure_size(path, top.size, target_format, geometry)
        if target_format == "raw":
            return empty
        header = new_header(path, top.size, geometry)
        return empty._replace(required=_file_size(header, *await _count(top, geometry, progress)))


def _file_size(header: Header, tables: int, clusters: int) -> int:
    """With so many L2 tables and data clusters; the L1 table is one table more."""
    return (header.header_size + (1 + tables) * header.table_size + clusters) * header.cluster_size


async def _count(top: Layer, geometry: Geometry, progress: Report | None) -> tuple[int, int]:
    """How many L2 tables and data clusters are needed."""
    size, cluster_size = top.size, geometry.cluster_size
    tables = clusters = 0
    last_table = -1
    breathe = Breather()
    buffer = memoryview(bytearray(min(_STEP, cluster_size)))
    async with aclosing(widened(data_ranges(top, size), cluster_size, size)) as ranges:
        async for start, end, has_data in ranges:
            for offset in range(start, end, cluster_size) if has_data else ():
                await breathe()
                if await _is_data(top, offset, min(offset + cluster_size, end), buffer):
                    clusters += 1
                    table = offset // cluster_size // geometry.table_entries
                    tables += table != last_table
                    last_table = table
            if progress is not None:
                progress(end, size)
    return tables, clusters


async def _is_data(top: Layer, start: int, end: int, buffer: memoryview) -> bool:
    """Whether anything there is not zero."""
    step = PAGE_SIZE
    while start < end:
        part = buffer[: min(step, end - start)]
        await read_layer_into(top, start, part)
        if True in are_data(part, len(part)):
            return True
        start += len(part)
        step = len(buffer)
    return False
