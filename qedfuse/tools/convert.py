"""Copying a disk image into another format: what a guest reads stays the same, holes and zeroes stay holes.

    map        which ranges have data (`mapping.walk`), or may differ from the target's backing file
    widen      those ranges to whole blocks; neighbours merge, and what lies between them is all zeroes (or the same)
    share      where the host can let both files have the same blocks, nothing is read (`convert_sharing.py`)
    copy       in steps: read, look for blocks of zeroes (or blocks that do not differ), write the others in order

One step is in memory at a time. Reading and writing are mostly copies from and to the host's page cache, while the disk
reads ahead and writes behind (`output_file.py` sees to it that it begins early).

Source: qemu-img(1), "convert".
"""

from __future__ import annotations

import mmap
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing

from qedfuse.chain.alone import open_alone
from qedfuse.chain.policy import ANY_BACKING, BackingPolicy
from qedfuse.chain.unfinished import refuse_unfinished_at
from qedfuse.errors import UsageError
from qedfuse.host.closing import closing
from qedfuse.host.file_id import FileId
from qedfuse.host.file_storage import INLINE_WRITE_LIMIT
from qedfuse.host.waiting import Breather, NeedsEventLoopError, Way, way
from qedfuse.layers.layer import Layer
from qedfuse.layers.resolve import read_layer_into
from qedfuse.progress import Report
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import Header
from qedfuse.qed.new_image import new_header
from qedfuse.sizes import SECTOR_SIZE, round_down, round_up
from qedfuse.tools.blocks import are_data, differ, runs
from qedfuse.tools.convert_ranges import Range, data_ranges, differing_ranges, files_of, whole_range, widened
from qedfuse.tools.convert_sharing import Reflink, Sharing
from qedfuse.tools.convert_target import FileTarget, Target, new_qed_target, raw_target
from qedfuse.tools.shrinking import refuse_shrunk

#: So many zeroes in a row become a hole: qemu-img's default.
SPARSE_SIZE = 4096
MAX_SPARSE_SIZE = 16 << 20
#: Bytes of one step: no more than what is written inline, and stays in a processor's cache meanwhile. Threads to read
#: and to write at once gain nothing.
_STEP = INLINE_WRITE_LIMIT
#: A larger block than this is stored in parts.
_MAX_BLOCK = 4 << 20

#: Told what is being done, in a word or two, again and again. Must return soon, and not raise.
Tell = Callable[[str], None]
SHARING = "sharing blocks"
COPYING = "copying"


def _ignore(*_arguments: object) -> None:
    pass


async def convert_image(
    source: str,
    target: str,
    *,
    source_format: str | None = None,
    target_format: str = "raw",
    geometry: Geometry | None = None,
    backing: str | None = None,
    backing_format: str | None = None,
    create: bool = True,
    sparse_size: int = SPARSE_SIZE,
    share: bool = False,
    reflink: Reflink = Reflink.AUTO,
    policy: BackingPolicy = ANY_BACKING,
    progress: Report = _ignore,
    tell: Tell = _ignore,
) -> Header | None:
    """Copy the disk in `source` (raw, qed or qcow2, with its chain) to `target` (raw or qed); durable on return.

    `source_format` None: probed. `geometry`, `backing` and `backing_format` are for a new QED image, as in
    `create_image`; of what is the same in `backing` nothing is stored. `create` False: the target exists and is filled,
    be its size what it is. `sparse_size`: bytes, a multiple of 512 up to 16 MiB; 0: the target is stored whole, zeroes
    and all. `share` takes no locks on what is read. `reflink`: whether source and target may have blocks in common.
    `policy` is for every backing file, `backing` among them. `tell` is told what is being done.

    Returns the header of a new QED image. Raises UsageError, InUseError, QedfuseError, OSError. On an error, and when
    cancelled, a new target is removed and one that was to be replaced is empty; with `create` False it is half-written.
    Under `run_blocking` NeedsEventLoopError, with nothing changed, unless source and target are files by themselves.
    """
    if sparse_size % SECTOR_SIZE or not 0 <= sparse_size <= MAX_SPARSE_SIZE:
        raise UsageError(target, f"the sparse size must be a multiple of {SECTOR_SIZE} up to {MAX_SPARSE_SIZE}")
    is_new_image = create and target_format == "qed"
    if not is_new_image and (geometry or backing is not None):
        raise UsageError(target, "cluster size, table size and backing file are for new qed images only")
    obstacle = _obstacle(is_image=target_format == "qed", create=create, backing=backing, sparse_size=sparse_size)
    if reflink is Reflink.ALWAYS and obstacle:
        raise UsageError(target, f"blocks cannot be shared: {obstacle}")
    refuse_unfinished_at(target)
    async with AsyncExitStack() as stack:
        top = await stack.enter_async_context(closing(await _open_source(source, source_format, share, policy)))
        size = top.size
        below: Layer | None = None
        header: Header | None = None
        out: Target
        if target_format == "raw":
            out = await stack.enter_async_context(raw_target(target, size, create=create, sources=_names(top)))
        elif create and backing is None:
            header = new_header(target, size, geometry or Geometry())
            out = await stack.enter_async_context(new_qed_target(target, header, sources=_names(top)))
        else:
            _need_event_loop()
            from qedfuse.chain.chain import open_backing
            from qedfuse.tools.convert_image_target import old_qed_target, overlay_target

            if backing is None:
                old = old_qed_target(target, size, policy=policy, sources=_names(top))
                out = await stack.enter_async_context(old)
            else:
                below = await stack.enter_async_context(
                    closing(await open_backing(target, backing, backing_format, share=share, policy=policy))
                )
                name = os.fsencode(backing)
                header = new_header(target, size, geometry or Geometry(), name, backing_is_raw=below.format == "raw")
                sources = _names(top) | _names(below)
                out = await stack.enter_async_context(overlay_target(target, header, name, below, sources=sources))
        sharing: Sharing | None = None
        if isinstance(out, FileTarget) and not obstacle and reflink is not Reflink.NEVER:
            sharing = Sharing(top, out, target, always=reflink is Reflink.ALWAYS)
        with refuse_shrunk(top, below):
            await _Copy(top, size, out, below, sparse_size, sharing).run(progress, tell)
    return header


def _need_event_loop() -> None:
    if way.get() is Way.BLOCKING:
        raise NeedsEventLoopError


async def _open_source(path: str, format: str | None, share: bool, policy: BackingPolicy) -> Layer:
    if way.get() is Way.BLOCKING:
        return await open_alone(path, format, share=share)
    from qedfuse.chain.chain import open_layer

    return await open_layer(path, format, share=share, policy=policy)


def _obstacle(*, is_image: bool, create: bool, backing: str | None, sparse_size: int) -> str | None:
    """What keeps a target from sharing blocks, wherever it is."""
    if not sparse_size:
        return "-S 0 stores everything"
    if backing is not None:
        return "what differs from a backing file is found by reading it, and copied"
    return "an image that exists (-n) is written, not replaced" if is_image and not create else None


class _Copy:
    """One conversion. `size` is the disk's; `below`: the target is new and shows this where nothing is written.
    `sharing`: what can be shared need not be copied."""

    def __init__(
        self, source: Layer, size: int, target: Target, below: Layer | None, sparse_size: int, sharing: Sharing | None
    ) -> None:
        self._source = source
        self._size = size
        self._target = target
        self._below = below
        self._sharing = sharing
        self._whole = sparse_size == 0
        self._block = round_up(sparse_size or SECTOR_SIZE, min(target.unit, _MAX_BLOCK))
        self._step = round_up(_STEP, self._block)
        self._buffer = _new_buffer(self._step)
        self._old = _new_buffer(self._step)
        self._breathe = Breather()

    async def run(self, progress: Report, tell: Tell) -> None:
        if self._whole:
            self._target.keep_zeroes()
        async with aclosing(self._ranges()) as ranges:
            async for start, end, copy in ranges:
                if not copy and not self._target.blank:
                    await self._target.zero(start, end - start)
                if copy and self._sharing:
                    async with aclosing(self._sharing.share(start, end)) as pieces:
                        async for piece in pieces:
                            await self._breathe()
                            tell(SHARING if piece.shared else COPYING)
                            if not piece.shared:
                                await self._copy(piece.start, piece.end, progress)
                            progress(piece.end, self._size)
                elif copy:
                    await self._copy(start, end, progress)
        progress(self._size, self._size)

    def _ranges(self) -> AsyncGenerator[Range, None]:
        if self._whole:
            return whole_range(self._size)
        if self._below:
            return widened(differing_ranges(self._source, self._below, self._size), self._block, self._size)
        return widened(data_ranges(self._source, self._size), self._block, self._size)

    async def _copy(self, start: int, end: int, progress: Report) -> None:
        while start < end:
            await self._breathe()
            stop = min(end, round_down(start, self._step) + self._step)
            await self._copy_step(start, stop)
            start = stop
            progress(start, self._size)

    async def _copy_step(self, start: int, end: int) -> None:
        data = self._buffer[: end - start]
        await read_layer_into(self._source, start, data)
        if self._whole:
            await self._target.write(start, data)
            return
        if self._below:
            old = self._old[: end - start]
            await read_layer_into(self._below, start, old)
            wanted = differ(data, old, self._block)
        else:
            wanted = are_data(data, self._block)
        for first, last, is_wanted in runs(wanted, self._block, end - start):
            if is_wanted:
                await self._target.write(start + first, data[first:last])
            elif not self._target.blank:
                await self._target.zero(start + first, last - first)


def _new_buffer(size: int) -> memoryview:
    """Memory that begins with a page. From a file's page cache to addresses a little behind a page's start, as malloc
    gives them, processors copy several times slower (4 KiB aliasing).
    """
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _names(top: Layer) -> dict[FileId, str]:
    return {found: path for path, found in files_of(top).items()}
