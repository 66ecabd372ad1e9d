"""How a guest range is resolved through a backing chain, and read.

Mapping is a value: `resolve` turns a range into a flat list of `Extent`s, which readers and copy-on-write execute.
Nothing here recurses, so a long chain costs time, not stack. (What `map` and SEEK_HOLE tell comes from `mapping.py`.)
"""

from __future__ import annotations

from typing import NamedTuple

from qedfuse.host.storage import fill
from qedfuse.layers.layer import Layer
from qedfuse.layers.runs import NO_PLACE, Kind, Run
from qedfuse.sizes import GuestOffset, HostOffset


class Extent(NamedTuple):
    """A resolved range: where the bytes really are.

    `offset` is the guest offset (the same in every layer), `host` the byte offset in `layer.storage` for DATA. `layer`
    is None where the range reads as zeroes (ZERO, or UNALLOCATED all the way down).
    """

    offset: GuestOffset
    length: int
    kind: Kind
    layer: Layer | None
    host: HostOffset


_Range = tuple["Layer | None", GuestOffset, int]


def resolve_nowait(layer: Layer | None, offset: int, size: int) -> list[Extent] | None:
    """The extents of [offset, offset+size) through the chain from `layer` down, or None if any table must be read.

    What lies past a layer's end reads as zeroes. The extents come in guest order and cover the range exactly.
    """
    result: list[Extent] = []
    todo: list[_Range] = [(layer, GuestOffset(offset), size)]
    while todo:
        current, start, length = _clip(todo.pop(), result)
        if current is None:
            continue
        runs = current.map_nowait(start, length)
        if runs is None:
            return None
        _sort_runs(current, start, runs, result, todo)
    result.sort()
    return result


async def resolve(layer: Layer | None, offset: int, size: int) -> list[Extent]:
    """As `resolve_nowait`, reading tables as needed. Raises OSError; cancellation leaves nothing behind."""
    result: list[Extent] = []
    todo: list[_Range] = [(layer, GuestOffset(offset), size)]
    while todo:
        current, start, length = _clip(todo.pop(), result)
        if current is None:
            continue
        runs = await current.map(start, length)
        covered = _sort_runs(current, start, runs, result, todo)
        if covered < length:
            todo.append((current, start + covered, length - covered))
    result.sort()
    return result


def _clip(item: _Range, result: list[Extent]) -> _Range:
    """The part of a range that lies inside its layer; the rest is emitted as unallocated. Layer None: nothing left."""
    current, start, length = item
    inside = 0 if current is None else max(0, min(length, current.size - start))
    if inside < length:
        result.append(Extent(start + inside, length - inside, Kind.UNALLOCATED, None, NO_PLACE))
    return (current if inside else None), start, inside


def _sort_runs(current: Layer, start: GuestOffset, runs: list[Run], result: list[Extent], todo: list[_Range]) -> int:
    """Emit what this layer settles, queue what the layer below must say. Returns the bytes the runs cover."""
    position = start
    for kind, length, host in runs:
        if kind is Kind.UNALLOCATED:
            todo.append((current.backing, position, length))
        else:
            owner = None if kind is Kind.ZERO else current
            result.append(Extent(position, length, kind, owner, host))
        position += length
    return position - start


def read_extents_nowait(extents: list[Extent], offset: int, size: int) -> bytes | bytearray | None:
    """The bytes of a resolved range if all of them are cached, so that no read blocks, else None."""
    buffer = bytearray(size)
    if len(extents) == 1 and extents[0].layer is None:
        return buffer
    view = memoryview(buffer)
    for start, length, kind, owner, host in extents:
        if owner is None:
            continue
        position = start - offset
        if kind is not Kind.DATA or not owner.storage.read_into_nowait(host, view[position : position + length]):
            return None
    return buffer


async def read_extents(extents: list[Extent], offset: int, size: int) -> bytearray:
    """The bytes of a resolved range. Raises OSError (EIO for a short read)."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    for start, length, kind, owner, host in extents:
        if owner is None:
            continue
        target = view[start - offset : start - offset + length]
        if kind is Kind.INDIRECT:
            target[:] = await owner.read_indirect(start, length)
        else:
            await owner.storage.read_into(host, target)
    return buffer


async def read_layer(layer: Layer | None, offset: int, size: int) -> bytes | bytearray:
    """`size` bytes at `offset` as seen through the chain from `layer` down; zeroes past its end or without a layer."""
    extents = resolve_nowait(layer, offset, size)
    if extents is not None:
        data = read_extents_nowait(extents, offset, size)
        if data is not None:
            return data
        return await read_extents(extents, offset, size)
    return await read_extents(await resolve(layer, offset, size), offset, size)


async def read_layer_into(layer: Layer | None, offset: int, target: memoryview) -> None:
    """As `read_layer`, into memory that is there already. Raises OSError; `target` may be filled in part then."""
    extents = resolve_nowait(layer, offset, len(target))
    if extents is None:
        extents = await resolve(layer, offset, len(target))
    for start, length, kind, owner, host in extents:
        part = target[start - offset : start - offset + length]
        if owner is None:
            part[:] = bytes(length)
        elif kind is Kind.INDIRECT:
            part[:] = await owner.read_indirect(start, length)
        else:
            await fill(owner.storage, host, part)
