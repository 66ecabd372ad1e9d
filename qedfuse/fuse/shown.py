"""What is shown of a node: of an open image what is true now, of another what a look at its file has found."""

from __future__ import annotations

import errno
import os
from typing import cast

from qedfuse.chain.header_peek import Peek
from qedfuse.fuse.attributes import Attributes, host_blocks, raw_attributes
from qedfuse.fuse.node import Node
from qedfuse.fuse.options import MountOptions
from qedfuse.host.file_storage import FileStorage
from qedfuse.layers.layer import Layer, layers_of
from qedfuse.qed.image import Image


async def attributes_now(node: Node, peek: Peek | None, *, options: MountOptions, fresh: bool = True) -> Attributes:
    """`peek`: for a node whose image is not open. `fresh`: the files of the chain are asked what they are like. Raises
    OSError, ESTALE if the image was closed and there is no `peek`."""
    slot = node.mounted.slot
    while slot.image is not None:
        async with slot as image:
            if fresh:
                await refresh(image)
            if slot.image is image:  # else it was closed meanwhile, and another one may be open by now
                return attributes_of(node, image, options)
    if peek is None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    writable = not node.mounted.read_only and peek.writable
    return raw_attributes(peek.status, peek.size, peek.status.st_blocks, writable=writable, options=options)


def attributes_of(node: Node, image: Image, options: MountOptions) -> Attributes:
    """Of a node's image, for one that holds its slot. Raises OSError."""
    status = image.storage.stat()
    writable = image.writable or (node.may_write and not node.mounted.read_only)
    return raw_attributes(status, image.size, host_blocks(image), writable=writable, options=options)


async def refresh(top: Layer) -> None:
    """Have the files of a chain tell what they are like now."""
    for layer in layers_of(top):
        await cast(FileStorage, layer.storage).refresh()
