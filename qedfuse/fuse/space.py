"""How much room there is: the host file system's, or the block device's, as that is what runs out."""

from __future__ import annotations

from typing import NamedTuple, cast

from qedfuse.fuse.image_slot import ImageSlot
from qedfuse.fuse.tree import Tree
from qedfuse.host.file_storage import FileStorage
from qedfuse.qed.geometry import DEFAULT_CLUSTER_SIZE
from qedfuse.qed.image import Image


class Space(NamedTuple):
    """`cluster_size` in bytes, of several images the largest one, which is a multiple of the others: shown as f_bsize,
    from which the loop driver takes its discard granularity. `blocks`, `free` and `available`, which an ordinary user
    can have, in `unit`s of so many bytes. `longest_name` in bytes."""

    cluster_size: int
    unit: int
    blocks: int
    free: int
    available: int
    longest_name: int


async def space_of(tree: Tree) -> Space:
    """Raises OSError."""
    slots = [node.mounted.slot for node in tree.nodes if node.mounted.opened]
    if not slots:
        host = await tree.sources.statvfs()
        size = DEFAULT_CLUSTER_SIZE
        return Space(size, host.f_frsize, host.f_blocks, host.f_bfree, host.f_bavail, host.f_namemax)
    largest = max(_image_in(slot).geometry.cluster_size for slot in slots)
    async with min(slots, key=_may_not_answer) as image:
        host = await cast(FileStorage, image.storage).statvfs()
        if image.room is None:
            return Space(largest, host.f_frsize, host.f_blocks, host.f_bfree, host.f_bavail, host.f_namemax)
        unit = image.geometry.cluster_size
        blocks = image.storage.size() // unit
        free = min(image.room // unit, blocks)
        return Space(largest, unit, blocks, free, free, host.f_namemax)


def _may_not_answer(slot: ImageSlot) -> bool:
    return not cast(FileStorage, _image_in(slot).storage).local


def _image_in(slot: ImageSlot) -> Image:
    assert slot.image is not None
    return slot.image
