"""What a mount shows: one image as the root itself, or a directory of raw files, one an image.

Images named on the command line are open as long as the mount lives. Those of a SOURCE directory come and go: a name is
looked up on the host each time, and a file is the same node as before if it is the same file and no other process
changed it meanwhile. A changed file becomes a new node, since the kernel keeps what it knows of the old one (pages and,
with the writeback cache, the size).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from functools import partial

import trio

from qedfuse.chain.header_peek import Peek
from qedfuse.errors import InUseError, QedfuseError
from qedfuse.fuse.image_slot import ImageSlot
from qedfuse.fuse.image_sources import Found, Sources, shown_name
from qedfuse.fuse.mounted_image import MountedImage
from qedfuse.fuse.node import Entry, Node
from qedfuse.host.file_id import FileId, FileMark
from qedfuse.qed.image import Image

ROOT = 1

#: Up to so many files keep their inode numbers for as long as they exist, even if the kernel forgets them.
_MANY = 4096

#: Seconds that idle images may take to make way for one that they exclude.
_WAY_PATIENCE = 5.0


class Tree:
    """The files of a mount, by inode number and by name.

    `root`: the one image that is the mount's root, None for a directory. `make` makes the MountedImage of a path in one
    of the source `directories`.
    """

    def __init__(
        self,
        directories: Iterable[str] = (),
        make: Callable[[str], MountedImage] | None = None,
    ) -> None:
        self.root: Node | None = None
        self.sources = Sources(directories)
        self._make = make
        self._nodes: dict[int, Node] = {}
        self._by_key: dict[FileId, Node] = {}
        self._fixed: dict[bytes, Node] = {}
        self._next_id = ROOT + 1

    # -- images of the command line -----------------------------------------------------------------------------------

    def set_root(self, mounted: MountedImage) -> None:
        """Show one open image as the root."""
        self.root = self._add_fixed(ROOT, mounted)

    def add(self, mounted: MountedImage) -> None:
        """Show an open image in the directory. Raises QedfuseError if another one has its name there."""
        name = os.fsencode(shown_name(os.path.basename(mounted.path)))
        if name in self._fixed:
            other = self._fixed[name].mounted.path
            raise QedfuseError(mounted.path, f"and {other} would both be shown as {os.fsdecode(name)}", errno.EEXIST)
        node = self._fixed[name] = self._add_fixed(self._take_id(), mounted)
        node.name = name

    def _add_fixed(self, id: int, mounted: MountedImage) -> Node:
        image = mounted.opened
        assert image is not None
        status = image.storage.stat()
        node = Node(id, mounted, FileId.of(status), FileMark.of(status), image.size, fixed=True)
        node.may_write = image.writable
        mounted.on_replace = partial(self._note_key, node)
        self._nodes[id] = self._by_key[node.key] = node
        return node

    # -- the kernel's questions ---------------------------------------------------------------------------------------

    def node(self, id: int) -> Node:
        """The node with this inode number. Raises OSError(ESTALE)."""
        node = self._nodes.get(id)
        if node is None or node.stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return node

    async def find(self, name: bytes) -> Entry | None:
        """What is shown as `name`."""
        fixed = self._fixed.get(name)
        if fixed is not None:
            return Entry(name, fixed, None)
        found = await self.sources.find(name)
        return self._to_entry(name, found) if found else None

    async def entries(self) -> list[Entry]:
        """All there is, by name. Forgets what is gone and unknown to the kernel."""
        result = [Entry(name, node, None) for name, node in self._fixed.items()]
        if self.sources:
            fixed = {name: (node.mounted.path, node.key) for name, node in self._fixed.items()}
            found, complete = await self.sources.list(fixed)
            result += [self._to_entry(name, image) for name, image in found.items()]
            if complete:
                self._prune({FileId.of(image.peek.status) for image in found.values()})
        result.sort(key=lambda entry: entry.name)
        return result

    async def look(self, node: Node) -> Peek:
        """A look at a node whose image is not open. Raises OSError(ESTALE) if the file is another one by now."""
        peek = await self.sources.look(node.mounted.path)
        if peek is None or not node.is_at(peek):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        node.may_write = peek.writable
        return peek

    async def acquire(self, node: Node, *, to_write: bool, by_name: bool = True) -> ImageSlot:
        """A node's slot, with its image open; to be released with `node.mounted.release()`.

        `by_name`: it is opened by its name, which must not have become another file's. Raises OSError(ESTALE) if it
        has, upon which the kernel looks the name up anew, and what `open_for_use` raises.
        """
        if by_name and not node.fixed:
            found = await self.find(node.name)
            if found is None or found.node is not node:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        elif node.mounted.opened is None:
            await self.look(node)
        try:
            return await self._open(node, to_write)
        except InUseError:  # by one of ours perhaps, of which it is the backing file; it may be closed by now
            await self._make_way()
        return await self._open(node, to_write)

    async def _make_way(self) -> None:
        """Close all images that only linger. Those that take long are not waited for: they may never be closed."""
        with trio.move_on_after(_WAY_PATIENCE):
            async with trio.open_nursery() as nursery:
                for mounted in {node.mounted for node in self.nodes if node.mounted.open}:
                    nursery.start_soon(mounted.close_if_idle)

    async def _open(self, node: Node, to_write: bool) -> ImageSlot:
        slot = await node.mounted.acquire(to_write=False)
        try:
            async with slot as image:
                if FileId.of(image.storage.stat()) != node.key:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            if to_write:
                await node.mounted.make_writable()
                async with slot as image:
                    self._note_key(node, image)
        except BaseException:
            node.mounted.release()
            raise
        return slot

    def _note_key(self, node: Node, image: Image) -> None:
        """The node's file is another one by now: that of an image that has replaced the one before. Or it has another
        number, as an overlay file system gives a file that is opened for writing the first time."""
        key = FileId.of(image.storage.stat())
        if key != node.key:
            if self._by_key.get(node.key) is node:
                del self._by_key[node.key]
            node.key = key
            self._by_key[key] = node

    def forget(self, id: int, lookups: int) -> None:
        """The kernel drops references."""
        node = self._nodes.get(id)
        if node is not None:
            node.lookups -= lookups
            if node.stale or len(self._nodes) > _MANY:
                self._drop(node)

    @property
    def nodes(self) -> list[Node]:
        return list(self._nodes.values())

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _to_entry(self, name: bytes, found: Found) -> Entry:
        path, peek = found
        key = FileId.of(peek.status)
        node = self._by_key.get(key)
        if node is not None and not node.fixed:
            if node.is_at(peek):
                node.mounted.path = path  # it may have been renamed
            else:
                node.stale = True
                node = None
        if node is None:
            assert self._make is not None
            node = Node(self._take_id(), self._make(path), key, FileMark.of(peek.status), peek.size, fixed=False)
            node.mounted.on_replace = partial(self._note_key, node)
            self._nodes[node.id] = self._by_key[key] = node
        if not node.fixed:
            node.name = name
            node.may_write = peek.writable
        return Entry(name, node, peek)

    def _prune(self, present: set[FileId]) -> None:
        for node in self.nodes:
            if node.stale or node.key not in present:
                self._drop(node)
        self.sources.keep_only(present)

    def _drop(self, node: Node) -> None:
        """Forget a node, unless it is `fixed`, the kernel refers to it or its image is busy."""
        if not node.fixed and node.lookups <= 0 and not node.mounted.busy:
            del self._nodes[node.id]
            if self._by_key.get(node.key) is node:
                del self._by_key[node.key]

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1
