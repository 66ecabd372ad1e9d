"""A raw file of a mount, as the kernel knows it: by number, whatever its names are."""

from __future__ import annotations

from typing import NamedTuple

from qedfuse.chain.header_peek import Peek
from qedfuse.fuse.mounted_image import MountedImage
from qedfuse.host.file_id import FileId, FileMark


class Node:
    """A raw file. `fixed`: its image stays open. `stale`: another process changed or replaced the image's file.

    `key`, `mark` and `size` are the file, its state and the image's size when it was first looked at; `name` is how it
    was last called; `may_write`: whether the host lets us write the file; `lookups` counts the kernel's references,
    `direct_writers` the handles that write past its cache.
    """

    __slots__ = (
        "__weakref__",
        "direct_writers",
        "fixed",
        "id",
        "key",
        "lookups",
        "mark",
        "may_write",
        "mounted",
        "name",
        "size",
        "stale",
    )

    def __init__(self, id: int, mounted: MountedImage, key: FileId, mark: FileMark, size: int, *, fixed: bool) -> None:
        self.id = id
        self.mounted = mounted
        self.key = key
        self.mark = mark
        self.size = size
        self.name = b""
        self.may_write = False
        self.fixed = fixed
        self.lookups = 0
        self.direct_writers = 0
        self.stale = False

    def is_at(self, peek: Peek) -> bool:
        """Whether `peek` saw this node's file as we know it."""
        if self.key != FileId.of(peek.status):
            return False
        left = self.mounted.left
        if self.mounted.changing or peek.time <= left.left_at:
            return True  # it has changed since, but by us
        known, size = (left.mark, left.size) if left.mark else (self.mark, self.size)
        found = FileMark.of(peek.status)
        # A new name, owner or mode has another ctime, too. If more has changed, `page_cache.py` drops the pages.
        return found == known or (found[:2] == known[:2] and peek.size == size)


class Entry(NamedTuple):
    """A name in the directory. `peek` is None for an image of the command line: it is open."""

    name: bytes
    node: Node
    peek: Peek | None
