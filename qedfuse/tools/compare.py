"""Whether two disks have the same content, whatever their formats.

    map      both are walked (`convert_ranges.pairs`); zeroes in both, and the same bytes of the same file, are the same
             unread
    read     what is stored only in one of them must be zeroes; what is in both, the same

Of disks of different sizes, what the larger one has more must be zeroes.

Source: qemu-img(1), "compare".
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from enum import Enum
from typing import NamedTuple

from qedfuse.chain.chain import open_layer
from qedfuse.chain.policy import ANY_BACKING, BackingPolicy
from qedfuse.errors import QedfuseError
from qedfuse.host.closing import closing
from qedfuse.host.waiting import Breather
from qedfuse.layers.layer import Layer
from qedfuse.layers.mapping import MapEntry
from qedfuse.layers.resolve import read_layer_into
from qedfuse.progress import Report
from qedfuse.sizes import SECTOR_SIZE, round_down, round_up
from qedfuse.tools.blocks import are_data, differ
from qedfuse.tools.convert_ranges import files_of, is_same, pairs

#: qemu-img's, of what goes wrong while the images are opened, mapped and read: 1 says that they differ.
EXIT_NOT_OPENED = 2
EXIT_NOT_MAPPED = 3
EXIT_NOT_READ = 4

#: Bytes of one step.
_STEP = 1 << 20


class Difference(Enum):
    """What is not the same."""

    SIZE = "size"
    #: What is stored, and what is not.
    STATUS = "status"
    CONTENT = "content"


class Comparison(NamedTuple):
    """`difference` None: the same content. `offset`: the first sector of 512 bytes that is not the same; where the
    parts begin of which different things are stored. `sizes`: the disks' in bytes."""

    difference: Difference | None
    offset: int
    sizes: tuple[int, int]


async def compare_images(
    one: str,
    other: str,
    *,
    one_format: str | None = None,
    other_format: str | None = None,
    strict: bool = False,
    share: bool = False,
    policy: BackingPolicy = ANY_BACKING,
    progress: Report | None = None,
) -> Comparison:
    """Compare the disks in two images (raw, qed or qcow2, with their chains). Formats that are None are probed.

    `strict`: the sizes must be the same, too, and what is stored of the disks. `share` takes no locks. Raises OSError,
    with an `exit_code` that says what has failed.
    """
    async with (
        _opened(one, one_format, share, policy) as first,
        _opened(other, other_format, share, policy) as second,
    ):
        sizes = first.size, second.size
        if strict and first.size != second.size:
            return Comparison(Difference.SIZE, 0, sizes)
        layers = (first, second) if first.size >= second.size else (second, first)
        difference, offset = await _Comparing(*layers, strict).run(progress)
        return Comparison(difference, offset, sizes)


@asynccontextmanager
async def _opened(path: str, format: str | None, share: bool, policy: BackingPolicy) -> AsyncIterator[Layer]:
    with _failing_with(EXIT_NOT_OPENED, path):
        layer = await open_layer(path, format, share=share, policy=policy)
    async with closing(layer):
        yield layer


@contextmanager
def _failing_with(code: int, path: str) -> Iterator[None]:
    """What is raised has this exit code, and names a file: `path` if it has none."""
    try:
        yield
    except QedfuseError as error:
        error.exit_code = code
        raise
    except OSError as error:
        message = os.strerror(error.errno).lower() if error.errno else str(error)
        failure = QedfuseError(error.filename or path, message, error.errno)
        failure.exit_code = code
        raise failure from error


class _Comparing:
    """`one` is no smaller than `other`."""

    def __init__(self, one: Layer, other: Layer, strict: bool) -> None:
        self._one = one
        self._other = other
        self._strict = strict
        self._breathe = Breather()

    async def run(self, progress: Report | None) -> tuple[Difference | None, int]:
        one, other, size = self._one, self._other, self._one.size
        files, others = files_of(one), files_of(other)
        async with aclosing(pairs(one, other, size)) as parts:
            while True:
                with _failing_with(EXIT_NOT_MAPPED, one.path):
                    part = await anext(parts, None)
                if part is None:
                    break
                start, end, entry, under = part
                if self._strict and (under is None or _status(entry) != _status(under)):
                    return Difference.STATUS, start
                if not is_same(entry, files, under, others):
                    offset = await self._first_difference(start, end, entry, under, progress)
                    if offset is not None:
                        return Difference.CONTENT, offset
                if progress is not None:
                    progress(end, size)
        if progress is not None:
            progress(size, size)
        return None, 0

    async def _first_difference(
        self, start: int, end: int, entry: MapEntry, under: MapEntry | None, progress: Report | None
    ) -> int | None:
        """The first sector that differs."""
        reads_one, reads_other = entry.data, under is not None and under.data
        if start % SECTOR_SIZE or end % SECTOR_SIZE:  # inside a file's last sector, of which another part has the rest
            start, end = round_down(start, SECTOR_SIZE), round_up(end, SECTOR_SIZE)
            reads_one = reads_other = True
        for position in range(start, end, _STEP):
            await self._breathe()
            length = min(_STEP, end - position)
            here = await _read(self._one, position, length) if reads_one else None
            there = await _read(self._other, position, length) if reads_other else None
            if here is not None and there is not None:
                different = [] if here == there else differ(memoryview(here), memoryview(there), SECTOR_SIZE)
            else:
                different = are_data(memoryview(here or there or b""), SECTOR_SIZE)
            if True in different:
                return position + different.index(True) * SECTOR_SIZE
            if progress is not None:
                progress(position + length, self._one.size)
        return None


def _status(entry: MapEntry) -> tuple[bool, bool, bool]:
    return entry.present, entry.zero, entry.data


async def _read(layer: Layer, offset: int, length: int) -> bytearray:
    data = bytearray(length)
    with _failing_with(EXIT_NOT_READ, layer.path):
        await read_layer_into(layer, offset, memoryview(data))
    return data
