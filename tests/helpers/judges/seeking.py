"""SEEK_DATA and SEEK_HOLE on the engine."""

from __future__ import annotations

from qedfuse.layers.layer import Layer
from qedfuse.layers.seek import find_segments


async def next_data(layer: Layer, offset: int) -> int | None:
    """The first byte at or behind `offset` that is data, None if there is none. Raises OSError as reading does.

    After `seek.PATIENCE`: a byte behind `offset` before which there is none.
    """
    found = await find_segments(layer, offset, data=True)
    position = offset if found.is_data else found.seek(offset, data=True)
    return None if position == layer.size else position


async def next_hole(layer: Layer, offset: int) -> int:
    """The first byte at or behind `offset` that is in a hole; the image's end counts as one. Raises OSError.

    After `seek.PATIENCE`: the image's end.
    """
    found = await find_segments(layer, offset, data=False)
    position = found.seek(offset, data=False)
    return layer.size if position is None else position
