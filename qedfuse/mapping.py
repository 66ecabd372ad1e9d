"""Where an image's bytes are, as `qemu-img map` tells it: a stream of extents through the chain.

Memory is bounded by what one layer says at a time, however large the image is. The depths are QEMU's: a range that no
layer has belongs to the last layer that was long enough to be asked.

Source: qemu-img(1), "map"; QAPI `MapEntry`; QEMU's block-status semantics, as observed.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncGenerator, Container, Iterable, Iterator
from contextlib import aclosing
from typing import NamedTuple

from qedfuse.layer import Kind, Layer
from qedfuse.scan import Breather
from qedfuse.storage import Storage

#: The host offset of zeroes that no layer has.
_NOWHERE = -1


class MapEntry(NamedTuple):
    """A range of the guest; bytes. `offset` is where it lies in the file `filename`, if it lies anywhere as it is.

    `depth`: 0 is the image, 1 its backing file, ... `present`: the layer at `depth` has it. `zero`: reads as zeroes.
    `data`: bytes are stored for it.
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

    `sparse`: layers (other than raw ones) of which what is stored may be holes of the host, and is told to be zeroes
    then. Raises OSError, CorruptError as the layers do.
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
    """A range that `layer` has told about. See `layer.Run`."""

    layer: Layer
    start: int
    end: int
    depth: int
    kind: Kind
    host: int


async def walk(top: Layer, start: int, end: int, *, sparse: Container[Layer] = ()) -> AsyncGenerator[MapEntry, None]:
    """As `map_image`, but not merged: for who looks for something, and reads no more of the tables than it takes."""
    todo: list[_Ask | _Known] = [_Ask(top, start, end, 0)]  # the ranges still to come, the nearest on top
    breathe = Breather()
    while todo:
        await breathe()
        item = todo.pop()
        if item.start >= item.end:
            continue
        if isinstance(item, _Ask):
            todo += reversed(await _ask(item))
        elif item.kind is Kind.UNALLOCATED:
            todo += reversed(_below(item))
        else:
            for entry in _entries(item, sparse):
                yield entry


async def _ask(item: _Ask) -> list[_Ask | _Known]:
    """What the layer knows of the range, and what is left to ask."""
    layer, position, end, depth = item
    inside = min(end, layer.size)
    known: list[_Ask | _Known] = []
    if position >= inside:  # an image in use has shrunk
        return []
    for run in await layer.map(position, inside - position):
        known.append(_Known(layer, position, position + run.length, depth, run.kind, run.host))
        position += run.length
    return [*known, _Ask(layer, position, end, depth)]


def _below(item: _Known) -> list[_Ask | _Known]:
    """A range that a layer has not: the part to ask the layer below for, and the part past that one's end."""
    below = item.layer.backing
    if below is None:
        return [item._replace(kind=Kind.ZERO, host=_NOWHERE)]
    covered = max(item.start, min(item.end, below.size))
    rest = item._replace(start=covered, kind=Kind.ZERO, host=_NOWHERE)
    return [_Ask(below, item.start, covered, item.depth + 1), rest]


def _entries(item: _Known, sparse: Container[Layer]) -> Iterator[MapEntry]:
    """The entries of a range that is settled. What is stored of a raw file may be holes after all."""
    layer, start, end, depth, kind, host = item
    if kind is Kind.ZERO and host > 0:
        yield MapEntry(start, end - start, depth, present=True, zero=True, data=False, offset=host, filename=layer.path)
    elif kind is Kind.ZERO:
        yield MapEntry(start, end - start, depth, present=host != _NOWHERE, zero=True, data=False)
    elif kind is Kind.INDIRECT:
        yield MapEntry(
            start, end - start, depth, present=True, zero=False, data=True, compressed=True, filename=layer.path
        )
    else:
        is_raw = layer.format == "raw"
        parts: Iterable[tuple[bool, int, int]] = [(True, host, host + end - start)]
        if is_raw or layer in sparse:
            parts = _data_and_holes(layer.storage, host, host + end - start)
        for data, offset, stop in parts:
            stored = data or not is_raw
            first = start + offset - host
            yield MapEntry(
                first,
                stop - offset,
                depth,
                present=True,
                zero=not data,
                data=stored,
                offset=offset,
                filename=layer.path,
            )


def _data_and_holes(storage: Storage, position: int, end: int) -> Iterator[tuple[bool, int, int]]:
    """(is data, start, end) of a file's range; all data where the file system does not tell."""
    while position < end:
        try:
            data = storage.next_data(position)
            data = end if data is None else min(data, end)
            if position < data:
                yield False, position, data
            position = data
            if position < end:
                hole = min(storage.next_hole(position), end)
                yield True, position, hole
                position = hole
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            yield True, position, end
            return
