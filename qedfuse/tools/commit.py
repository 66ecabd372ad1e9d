"""Writing an overlay into its base, and emptying it; what the overlay's guest reads is the same throughout.

The rulebook
============

This is the one place where a backing file is written: offline, under a writer's locks on it and on the overlay, so that
nothing else reads through it meanwhile, and only where the overlay hides what is written.

    1 grow      a base that is shorter than the overlay becomes as long: it reads as zeroes there, as it did
    2 copy      what the overlay has goes to the base: data as data, zeroes as zeroes, deallocated where that can be
    3 durable   the base is synced; a QED image is committed (`qed/commit.py`) and closed in good order
    4 empty     the overlay loses all its clusters (`qed/emptying.py`), unless it is to stay as it is

What a crash leaves:

    1, 2   the overlay as it was: in 1 what it has not reads as zeroes behind the base's old end, and so it does behind
           the new one; in 2 it has itself whatever is written below. The base reads as before or as the overlay,
           sector by sector. A QED base is written in the order of an image with a backing file, so its tables are
           consistent and it needs no check
    3      the same
    4      the base has all of it, durably: each cluster reads the same from either

In every case doing it again finishes it. Until 3 the base by itself is a mixture of old and new, and so is any other
image that has it below it, then as well: that is what committing means.

With a base further down (-b) the layers between are committed, too, as the overlay reads through them. They stay as
they are, and so does the overlay; only the overlay reads as before. (The layers between do not: the base has changed.)

Source: qemu-img(1), "commit".
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Protocol

import trio

from qedfuse.chain.backing import shown
from qedfuse.chain.chain import Chain
from qedfuse.chain.format_probe import QED
from qedfuse.chain.policy import ANY_BACKING, BackingPolicy
from qedfuse.chain.recovery import recover
from qedfuse.chain.upgrade import make_file_writable, make_writable
from qedfuse.errors import QedfuseError, UnsupportedError
from qedfuse.host.file_id import FileId
from qedfuse.host.file_storage import INLINE_WRITE_LIMIT, FileStorage
from qedfuse.host.offload import closed_to_its_end
from qedfuse.host.storage import Storage
from qedfuse.host.waiting import Breather
from qedfuse.layers.layer import Layer, layers_of
from qedfuse.layers.mapping import walk
from qedfuse.layers.raw import RawLayer
from qedfuse.progress import Report
from qedfuse.qed.emptying import empty_image
from qedfuse.qed.header import Header
from qedfuse.qed.image import Image
from qedfuse.sizes import SECTOR_SIZE, round_down, round_up
from qedfuse.tools.blocks import are_data, runs
from qedfuse.tools.convert_ranges import Range

#: Bytes that are copied at a time.
_STEP = INLINE_WRITE_LIMIT
#: Blocks of zeroes in data become zeroes of the base: what a file system can deallocate.
_BLOCK = 4096
#: Neighbouring ranges are joined up to so many bytes.
_MOST = 64 << 20
#: Zeroing can take long: a step that may be cancelled.
_ZERO_STEP = 1 << 30


class Base(Protocol):
    """What an overlay is written into. Offsets and sizes are bytes; functions raise OSError."""

    async def grow(self, size: int) -> None:
        """Be at least as long; what is added reads as zeroes."""
        ...

    async def write(self, offset: int, data: memoryview) -> None: ...

    async def zero(self, offset: int, size: int) -> None: ...

    async def finish(self) -> None:
        """All of it is durable when this returns."""
        ...


class RawBase:
    """A raw file or a block device that is open for writing. See `Base`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    async def grow(self, size: int) -> None:
        have = self._storage.size()
        if have < size:
            if self._storage.fixed:
                what = f"is a block device of {have} bytes, and the overlay has {size}"
                raise QedfuseError(self._storage.path, what, errno.ENOSPC)
            await self._storage.truncate(size)

    async def write(self, offset: int, data: memoryview) -> None:
        await self._storage.write(offset, [data])

    async def zero(self, offset: int, size: int) -> None:
        for start in range(offset, offset + size, _ZERO_STEP):
            await trio.lowlevel.checkpoint()
            await self._storage.punch(start, min(_ZERO_STEP, offset + size - start))

    async def finish(self) -> None:
        await self._storage.sync()


class QedBase:
    """A QED image that is open for writing. See `Base`."""

    def __init__(self, image: Image) -> None:
        self._image = image
        image.keep_order()

    async def grow(self, size: int) -> None:
        if self._image.size < size:
            await self._image.resize(size)

    async def write(self, offset: int, data: memoryview) -> None:
        await self._image.write(offset, data)

    async def zero(self, offset: int, size: int) -> None:
        await self._image.zero(offset, size)

    async def finish(self) -> None:
        await self._image.clean()


async def commit_image(
    path: str,
    base: str | None = None,
    *,
    keep: bool = False,
    policy: BackingPolicy = ANY_BACKING,
    progress: Report | None = None,
) -> None:
    """Write the image at `path` into its backing file, or into `base` further down, and empty it; durable on return.

    `keep`: it is not emptied; nor is it with `base`, which names a file of the chain from here or from the image's
    directory. `policy` is for all backing files.

    Raises InUseError (the base is, by anything that reads it, too), UnsupportedError (it is qcow2), QedfuseError,
    OSError. On an error, and when cancelled, the image reads as before and can be committed again; the base may have a
    part of it.
    """
    chain = Chain(False, policy)
    async with chain.closed_on_error():
        await chain.open_top(path, QED, writable=True)
        storage, header = chain.links[0]
        assert isinstance(header, Header)
        header = await recover(storage, header)
        overlay = Image(storage, header, chain.build_backing(), writable=False)
    async with closed_to_its_end(overlay):
        layer, depth = _find_base(overlay, base)
        await write_down(overlay, await _open_base(layer), depth, keep=keep or base is not None, progress=progress)


async def write_down(overlay: Image, base: Base, depth: int = 1, *, keep: bool, progress: Report | None = None) -> None:
    """Steps 1 to 4. `base` is the layer at `depth` below `overlay`, whose file is writable, but which itself is not."""
    await base.grow(overlay.size)
    await _copy(overlay, base, depth, progress)
    await base.finish()
    if not keep:
        with trio.CancelScope(shield=True):
            await empty_image(overlay.storage, overlay.header)


def _find_base(overlay: Image, name: str | None) -> tuple[Layer, int]:
    """The layer to write, and how far down it is. Raises QedfuseError."""
    below = list(enumerate(layers_of(overlay.backing), 1))
    if not below:
        raise QedfuseError(overlay.path, "does not have a backing file", errno.EINVAL)
    if name is None:
        depth, layer = below[0]
        return layer, depth
    wanted = set()
    for path in (name, os.path.join(os.path.dirname(overlay.path), name)):
        with suppress(OSError):
            wanted.add(FileId.at(path))
    for depth, layer in below:
        if FileId.of(layer.storage.stat()) in wanted:
            return layer, depth
    raise QedfuseError(overlay.path, f"did not find {shown(name)} in its backing chain", errno.EINVAL)


async def _open_base(layer: Layer) -> Base:
    """The layer, which is open for reading, for writing. Raises InUseError, UnsupportedError, OSError."""
    if isinstance(layer, Image):
        await make_writable(layer)
        return QedBase(layer)
    if isinstance(layer, RawLayer) and isinstance(layer.storage, FileStorage):
        await make_file_writable(layer.storage)
        return RawBase(layer.storage)
    what = f"is {layer.format}, which qedfuse does not write; `qemu-img commit` does, or convert the chain"
    raise UnsupportedError(layer.path, what)


async def _copy(overlay: Image, base: Base, depth: int, progress: Report | None) -> None:
    """Step 2."""
    size, breathe = overlay.size, Breather()
    async with aclosing(committed_ranges(overlay, depth)) as ranges:
        async for start, end, is_data in ranges:
            if not is_data:
                await base.zero(start, end - start)
            while is_data and start < end:
                await breathe()
                stop = min(end, round_down(start, _STEP) + _STEP)
                data = memoryview(await overlay.read(start, stop - start))
                for first, last, wanted in runs(are_data(data, _BLOCK), _BLOCK, len(data)):
                    if wanted:
                        await base.write(start + first, data[first:last])
                    else:
                        await base.zero(start + first, last - first)
                start = stop
            if progress:
                progress(end, size)
    if progress:
        progress(size, size)


async def committed_ranges(overlay: Layer, depth: int) -> AsyncGenerator[Range, None]:
    """What the layers above the one at `depth` have: data, and zeroes; in whole sectors, and in order. The rest is
    skipped. (A layer between that is too short has zeroes behind its end.)"""
    found: Range | None = None
    between = depth > 1  # otherwise what is below the overlay need not be looked at
    async with aclosing(walk(overlay, 0, overlay.size, below=between)) as entries:
        async for entry in entries:
            if entry.depth >= depth or not (entry.present or between):
                continue
            start, end = entry.start, entry.start + entry.length
            first = round_down(start, SECTOR_SIZE) if entry.data else round_up(start, SECTOR_SIZE)
            last = round_up(end, SECTOR_SIZE) if entry.data else round_down(end, SECTOR_SIZE)
            if first >= last:
                continue
            if found and found[1] >= first and found[2] is entry.data and last - found[0] <= _MOST:
                found = found[0], max(found[1], last), entry.data
                continue
            if found:
                yield found
            found = first, last, entry.data
    if found:
        yield found
