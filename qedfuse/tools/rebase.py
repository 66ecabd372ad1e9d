"""Putting an image over another backing file, or over none; the guest reads the same before, meanwhile and after.

The rulebook
============

    1 compare   what the image has not itself is compared as it reads through the old backing file and through the new
                one. The same bytes of the same file, and zeroes on both sides, are known to be the same by their maps
    2 copy      of each cluster that differs the image gets its own: a copy of the data, or an entry that says zeroes.
                That is an ordinary write (`qed/commit.py`), through the old backing file
    3 name      a commit with sync, then the new name, then the header, each with its sync (`Image.set_backing`)

What a crash leaves: in 1 and 2 the image over its old backing file, with more of its own; in 3 the old header or the
new one, with which the guest reads the same. In every case doing it again finishes it, and nothing is copied twice.

A backing file may be shorter than the image, and reads as zeroes behind its end, or longer, of which nothing shows.
Zeroes of the old one (data, holes, or behind its end) hide what the new one has there. The new backing file is only
read, and is locked while it is compared: what becomes of it later is for its owner to know.

Source: qemu-img(1), "rebase".
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing

import trio

from qedfuse.chain.chain import open_backing
from qedfuse.chain.opening import open_for_use
from qedfuse.chain.policy import ANY_BACKING, BackingPolicy
from qedfuse.chain.recovery import recover
from qedfuse.chain.unfinished import claim_for_writing
from qedfuse.errors import CorruptError
from qedfuse.host.closing import closing
from qedfuse.host.file_storage import INLINE_WRITE_LIMIT, FileStorage
from qedfuse.host.offload import closed_to_its_end
from qedfuse.host.waiting import Breather
from qedfuse.layers.layer import Layer
from qedfuse.layers.resolve import read_layer
from qedfuse.progress import Report
from qedfuse.qed.backing_name import set_backing_name
from qedfuse.qed.header_io import read_header
from qedfuse.qed.image import Image
from qedfuse.sizes import round_down, round_up
from qedfuse.tools.blocks import differ, runs
from qedfuse.tools.convert_ranges import Range, data_ranges, differing_ranges, widened
from qedfuse.tools.shrinking import refuse_shrunk

#: Bytes that are compared at a time.
_STEP = INLINE_WRITE_LIMIT


async def rebase_image(
    path: str,
    name: str,
    format: str | None = None,
    *,
    share: bool = False,
    policy: BackingPolicy = ANY_BACKING,
    progress: Report | None = None,
) -> None:
    """Put `name` below the image at `path`, in the place of its backing file; empty: nothing. Durable on return.

    A relative `name` is relative to the image's directory. `format` is raw, qed or qcow2; None: probed, once, and what
    is raw stays so. `share` takes no locks on the new backing file. `policy` is for all backing files.

    Raises InUseError, QedfuseError (`name` has the image in its chain, ENAMETOOLONG, ...) and OSError. On an error, and
    when cancelled, the image reads as before and can be rebased again.
    """
    image = await open_for_use(path, policy=policy)
    async with closed_to_its_end(image):
        if not name:
            await put_below(image, None, "", progress)
            return
        image.header.room_for_name(len(os.fsencode(name)), path)
        layer = await open_backing(path, name, format, share=share, policy=policy)
        try:
            await put_below(image, layer, name, progress)
        finally:
            if image.backing is not layer:
                with trio.CancelScope(shield=True):
                    await layer.close()


async def rename_backing(path: str, name: str, format: str | None = None) -> None:
    """Change the name in the image at `path` and nothing else, as if its backing file had been renamed; empty: it has
    none any more. Neither file is read. Durable on return. `format` "raw": the image says so.

    Raises InUseError, QedfuseError (`name` has the image in its chain, ENAMETOOLONG, ...) and OSError.
    """
    async with closing(FileStorage.open(path, writable=True)) as storage:
        claim_for_writing(storage.fileno(), path)
        header = await recover(storage, await read_header(storage))
        if name:
            await _refuse_loop(path, name, format)
        await set_backing_name(storage, header, os.fsencode(name), is_raw=format == "raw")


async def _refuse_loop(path: str, name: str, format: str | None) -> None:
    """Raise CorruptError if it is to be seen that the image would be below itself."""
    try:
        layer = await open_backing(path, name, format, share=True)
    except OSError as error:
        if isinstance(error, CorruptError) and error.errno == errno.ELOOP:
            raise
        return
    await layer.close()


async def put_below(image: Image, layer: Layer | None, name: str, progress: Report | None) -> None:
    """Steps 1 to 3."""
    old = image.backing
    try:
        with refuse_shrunk(old, layer):
            await _copy_what_differs(image, layer, progress)
        await image.set_backing(layer, name)
    finally:
        if old is not None and image.backing is not old:
            with trio.CancelScope(shield=True):
                await old.close()


async def _copy_what_differs(image: Image, layer: Layer | None, progress: Report | None) -> None:
    """Steps 1 and 2."""
    size, breathe = image.size, Breather()
    step = _STEP if layer else round_up(_STEP, image.geometry.cluster_size)  # without one, each cluster is read once
    async with aclosing(_ranges(image, layer, size)) as ranges:
        async for start, end, may_differ in ranges:
            while may_differ and start < end:
                await breathe()
                stop = min(end, round_down(start, step) + step)
                await _copy_step(image, layer, start, stop)
                start = stop
                if progress:
                    progress(start, size)
    if progress:
        progress(size, size)


def _ranges(image: Image, layer: Layer | None, size: int) -> AsyncGenerator[Range, None]:
    if layer is None:
        ranges = data_ranges(image, size, inherited=True)
    else:
        ranges = differing_ranges(image, layer, size, inherited=True)
    return widened(ranges, image.geometry.cluster_size, size)


async def _copy_step(image: Image, layer: Layer | None, start: int, end: int) -> None:
    """Whatever of these bytes differs, its cluster becomes the image's own, as a whole. (Of a cluster that is larger
    than a step all has been copied when the first of its bytes differs.)"""
    if layer is None:
        await image.copy_up(start, end - start, zeroes=False)
        return
    block = min(image.geometry.cluster_size, _STEP)
    now = memoryview(await image.read(start, end - start))
    then = memoryview(await read_layer(layer, start, end - start))
    for first, last, is_different in runs(differ(now, then, block), block, end - start):
        if is_different:
            await image.copy_up(start + first, last - first, zeroes=True)
