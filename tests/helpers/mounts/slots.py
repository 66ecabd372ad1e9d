"""Images and the slots that they have in a mount."""

from __future__ import annotations

from typing import Any

from qedfuse.fuse.image_slot import ImageSlot
from qedfuse.fuse.mounted_image import MountedImage
from qedfuse.qed.image import Image


def slot_of(image: Any) -> ImageSlot:
    """A slot with an image in it, or with what passes for one."""
    slot = ImageSlot()
    slot.put(image)
    return slot


async def acquire(mounted: MountedImage, *, to_write: bool) -> Image:
    """The image itself, for tests that look at what becomes of it."""
    slot = await mounted.acquire(to_write=to_write)
    assert slot.image is not None
    return slot.image
