"""Where an image's bytes are, as `qemu-img map` tells it: a stream of extents through the chain.

Memory is bounded by what one layer says at a time, however large the image is. The depths are QEMU's: a range that no
layer has belongs to the last layer that was long enough to be asked.

Clusters of a QED image that the host has holes for are told as `qemu-img map` tells the holes of a raw file: present,
zero, no data, at an offset. (It does not look for them in QED images, whose clusters it tells as data.) A script that
copies what is data copies all there is, and what is present hides the layers below as ever.

Source: qemu-img(1), "map"; QAPI `MapEntry`; QEMU's block-status semantics, as observed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Container
from contextlib import aclosing
from itertools import islice
from typing import NamedTuple

from qedfuse.host.storage import HostExtent
from qedfuse.host.waiting import Breather
from qedfuse.layers.extents import HostExtents
from qedfuse.layers.layer import Layer
from qedfuse.layers.runs import Kind

#: The host offset of zeroes that no layer has.
_NOWHERE = -1
#: What is mapped may be a hole of the host, and is no data then.
_FORMATS = ("raw", "qed")


class MapEntry(NamedTuple):
    """A range of the guest; bytes. `offset` is where it lies in the file `filename`, if it lies anywhere as it is.

    `depth`: 0 is the image, 1 its backing file, ... `present`: the layer at `depth` has it. `zero`: reads as zeroes.
    `data`: bytes are stored for it. (Of a preallocated qcow2 image what is mapped is `data`, as in QEMU, and `zero` if
    it is a hole of the host.)
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool = False
    offset: int | None = None
    filename: str | None = None

    def to_json(self) -> dict[str, object]:
        result: dict[str, object] = {
            "start": self.start,
            "length": self.length,
            "depth": self.depth,
            "present": self.present,
            "zero": self.zero,
            "data": self.data,
            "compressed": self.compressed,
        }
        if self.offset is not None:
            result["offset"] = self.offset
        if self.filename is not None:
            result["filename"] = self.filename
        return result

    def continues(self, before: MapEntry) -> bool:
        """Whether this is the same kind of thing as `before`, right behind it."""
        if self[2:7] != before[2:7] or self.filename != before.filename:
            return False
        return self.offset is None or self.offset - self.start == (before.offset or 0) - before.start


async def map_image(
    top: Layer, start: int = 0, length: int | None = None, *, sparse: Container[Layer] = ()
) -> AsyncGenerator[MapEntry, None]:
    """The entries of [start, start+length) (default: to the end of the image), in order, merged, without gaps.

    `sparse`: qcow2 layers of which what is mapped may be holes of the host, and is told to be zeroes then. Raises
    OSError, CorruptError as the layers do.
    """
    end = top.size if length is None else min(top.size, start + length)
    pending: MapEntry | None = None
    async with aclosing(walk(top, start, end, sparse=sparse)) as entries:
        async for entry in entries:
            if pending is not None and entry.continues(pending):
                pending = pending._replace(length=pending.length + entry.length)
                continue
            if pending is not None:
                yield pending
            pending = entry
    if pending is not None:
        yield pending


class _Ask(NamedTuple):
    """A range that `layer` has to tell about."""

    layer: Layer
    start: int
    end: int
    depth: int


class _Known(NamedTuple):
    """A range that `layer` has told about. See `runs.Run`."""

    layer: Layer
    start: int
    end: int
    depth: int
    kind: Kind
    host: int


class _Search:
    """What a walk has found out of the host's holes; see `HostExtents`."""

    def __init__(self) -> None:
        self._found: dict[Layer, tuple[object, HostExtents]] = {}

    def of(self, layer: Layer) -> HostExtents:
        """What holds for a layer's file now."""
        version, extents = self._found.get(layer, (None, None))
        if extents is None or version != layer.version:
            extents = HostExtents(layer.storage)
            self._found[layer] = layer.version, extents
        return extents

    async def extents(self, item: _Known, todo: list[_Ask | _Known]) -> list[HostExtent]:
        """What is stored of the beginning of a range that `item.layer` has, and what is a hole. Asks for what comes
        next in `todo`, too."""
        layer = item.layer
        extents = self.of(layer)
        start, end = _host_range(item)
        found = extents.known(start, end)
        if not found:
            ranges = [(start, end)]
            for other in islice(reversed(todo), extents.ahead - 1):
                if not isinstance(other, _Known):
                    break
                if other.layer is layer and other.kind is Kind.DATA and not extents.known(other.host, other.host + 1):
                    ranges.append(_host_range(other))
            await extents.learn(ranges)
            found = extents.known(start, end)
        return found


def _host_range(item: _Known) -> tuple[int, int]:
    return item.host, item.host + item.end - item.start


async def walk(
    top: Layer,
    start: int,
    end: int,
    *,
    sparse: Container[Layer] = (),
    below: bool = True,
) -> AsyncGenerator[MapEntry, None]:
    """As `map_image`, but not merged: a search that ends early has read no more of the tables than it needs.

    `below` False: what the top layer has not counts as zeroes.
    """
    todo: list[_Ask | _Known] = [_Ask(top, start, end, 0)]  # the ranges still to come, the nearest on top
    search = _Search()
    breathe = Breather()
    while todo:
        await breathe()
        item = todo.pop()
        if item.start >= item.end:
            continue
        if isinstance(item, _Ask):
            todo += reversed(await _ask(item, search))
        elif item.kind is Kind.UNALLOCATED:
            todo += reversed(_below(item, item.layer.backing if below else None))
        elif item.kind is Kind.DATA and (item.layer.format in _FORMATS or item.layer in sparse):
            for extent in await search.extents(item, todo):
                entry = _stored(item, extent)
                item = item._replace(start=entry.start + entry.length, host=extent.end)
                yield entry
            todo.append(item)
        else:
            yield _entry(item)


async def _ask(item: _Ask, search: _Search) -> list[_Ask | _Known]:
    """What the layer knows of the range, and what is left to ask."""
    layer, position, end, depth = item
    inside = min(end, layer.size)
    known: list[_Ask | _Known] = []
    if position >= inside:  # an image in use has shrunk
        return []
    for run in await layer.map(position, inside - position, search.of(layer)):
        known.append(_Known(layer, position, position + run.length, depth, run.kind, run.host))
        position += run.length
    return [*known, _Ask(layer, position, end, depth)]


def _below(item: _Known, below: Layer | None) -> list[_Ask | _Known]:
    """A range that a layer has not: the part to ask the layer below for, and the part past that one's end."""
    if below is None:
        return [item._replace(kind=Kind.ZERO, host=_NOWHERE)]
    covered = max(item.start, min(item.end, below.size))
    rest = item._replace(start=covered, kind=Kind.ZERO, host=_NOWHERE)
    return [_Ask(below, item.start, covered, item.depth + 1), rest]


def _stored(item: _Known, extent: HostExtent) -> MapEntry:
    """The entry of a part of DATA; `extent` is where its layer's file has it, and begins where `item` does."""
    layer, start, _end, depth, _kind, host = item
    stored = extent.is_data or layer.format not in _FORMATS
    zero = not extent.is_data
    length = extent.end - host
    return MapEntry(start, length, depth, present=True, zero=zero, data=stored, offset=host, filename=layer.path)


def _entry(item: _Known) -> MapEntry:
    """The entry of a range whose layer has told all of it."""
    layer, start, end, depth, kind, host = item
    length = end - start
    if kind is Kind.DATA:
        return MapEntry(start, length, depth, present=True, zero=False, data=True, offset=host, filename=layer.path)
    if kind is Kind.INDIRECT:
        return MapEntry(start, length, depth, present=True, zero=False, data=True, compressed=True, filename=layer.path)
    if host > 0:
        return MapEntry(start, length, depth, present=True, zero=True, data=False, offset=host, filename=layer.path)
    return MapEntry(start, length, depth, present=host != _NOWHERE, zero=True, data=False)
