"""What a conversion fills: a raw disk or a QED image, new or there already."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import trio

from qedfuse.chain.opening import open_image
from qedfuse.chain.policy import BackingPolicy
from qedfuse.errors import QedfuseError
from qedfuse.host.file_id import FileId
from qedfuse.host.output_file import OutputFile, open_output, refuse_sources
from qedfuse.layers.layer import Layer
from qedfuse.qed.header import Header
from qedfuse.qed.image import Image
from qedfuse.qed.new_image import write_image

#: Zeroing a device can take long: a step that may be cancelled.
_ZERO_STEP = 1 << 30


class Target(Protocol):
    """A disk to fill, front to back. Offsets and sizes are bytes; functions raise OSError.

    `blank`: what is not written needs no `zero`. `unit`: what is stored is stored in blocks of so many bytes.
    """

    blank: bool
    unit: int

    async def write(self, offset: int, data: memoryview) -> None: ...

    async def zero(self, offset: int, size: int) -> None: ...

    def keep_zeroes(self) -> None:
        """Zeroes that are written shall take space."""
        ...


class RawTarget:
    """A raw disk. See `Target`."""

    unit = 1

    def __init__(self, file: OutputFile) -> None:
        self.blank = file.made
        self._file = file

    async def write(self, offset: int, data: memoryview) -> None:
        await self._file.write(offset, [data])

    async def zero(self, offset: int, size: int) -> None:
        for start in range(offset, offset + size, _ZERO_STEP):
            await trio.lowlevel.checkpoint()
            await self._file.punch(start, min(_ZERO_STEP, offset + size - start))

    def keep_zeroes(self) -> None:
        pass


class QedTarget:
    """A QED image. See `Target`."""

    def __init__(self, image: Image, *, blank: bool) -> None:
        self.blank = blank
        self.unit = image.geometry.cluster_size
        self._image = image

    async def write(self, offset: int, data: memoryview) -> None:
        await self._image.write(offset, data)

    async def zero(self, offset: int, size: int) -> None:
        await self._image.zero(offset, size)

    def keep_zeroes(self) -> None:
        self._image.keep_zeroes()


@asynccontextmanager
async def raw_target(path: str, size: int, *, create: bool, sources: Mapping[FileId, str]) -> AsyncIterator[RawTarget]:
    """A raw file of `size` bytes, or a block device with room for them; see `open_output`.

    `create` False: the file must be there, and be large enough; what is behind `size` stays.
    """
    async with open_output(path, create=create, is_image=False, sources=sources) as file:
        if file.made:
            await file.truncate(size)
        else:
            _check_room(path, file.size(), size)
        yield RawTarget(file)


@asynccontextmanager
async def new_qed_target(
    path: str, header: Header, backing_name: bytes, backing: Layer | None, *, sources: Mapping[FileId, str]
) -> AsyncIterator[QedTarget]:
    """A new image, empty over `backing`, which is the image's from then on; see `open_output`."""
    async with open_output(path, create=True, is_image=True, sources=sources) as file:
        await write_image(file, header, backing_name)
        image = Image(file, header, backing, writable=True)
        try:
            yield QedTarget(image, blank=True)
        except BaseException:
            with trio.CancelScope(shield=True), suppress(OSError):
                await image.close()
            raise
        await image.close()


@asynccontextmanager
async def old_qed_target(
    path: str, size: int, *, policy: BackingPolicy, sources: Mapping[FileId, str]
) -> AsyncIterator[QedTarget]:
    """An image that is there, of `size` bytes or more; see `open_image`. If the block fails, part of it is written."""
    refuse_sources(path, os.stat(path), sources)
    async with open_image(path, policy=policy) as image:
        _check_room(path, image.size, size)
        yield QedTarget(image, blank=False)
        await image.flush()


def _check_room(path: str, size: int, wanted: int) -> None:
    if size < wanted:
        raise QedfuseError(path, f"is smaller ({size} bytes) than the source ({wanted} bytes)", errno.ENOSPC)
