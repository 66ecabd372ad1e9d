"""A QED image that the engine fills in a conversion: one that is there, or has something below it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from qedfuse.chain.opening import open_image
from qedfuse.chain.policy import BackingPolicy
from qedfuse.host.file_id import FileId
from qedfuse.host.output_file import open_output, refuse_sources
from qedfuse.host.waiting import shielded
from qedfuse.layers.layer import Layer
from qedfuse.qed.header import Header
from qedfuse.qed.image import Image
from qedfuse.qed.new_image import write_image
from qedfuse.tools.convert_target import check_room


class ImageTarget:
    """A QED image that the engine writes. See `convert_target.Target`."""

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
async def overlay_target(
    path: str, header: Header, backing_name: bytes, backing: Layer, *, sources: Mapping[FileId, str]
) -> AsyncIterator[ImageTarget]:
    """A new image, empty over `backing`, which is the image's from then on; see `open_output`."""
    async with open_output(path, create=True, is_image=True, sources=sources) as file:
        await write_image(file, header, backing_name)
        image = Image(file, header, backing, writable=True)
        try:
            yield ImageTarget(image, blank=True)
        except BaseException:
            with shielded(), suppress(OSError):
                await image.close()
            raise
        await image.close()


@asynccontextmanager
async def old_qed_target(
    path: str, size: int, *, policy: BackingPolicy, sources: Mapping[FileId, str]
) -> AsyncIterator[ImageTarget]:
    """An image that is there, of `size` bytes or more; see `open_image`. If the block fails, part of it is written."""
    refuse_sources(path, os.stat(path), sources)
    async with open_image(path, policy=policy) as image:
        check_room(path, image.size, size)
        yield ImageTarget(image, blank=False)
        await image.flush()
