"""What a mount shows: one image as the root itself, or a directory of raw files, one an image.

Images named on the command line are open as long as the mount lives. Those of a SOURCE directory come and go: a name is
looked up on the host each time, and a file is the same node as before if it is the same file and nobody else changed it
meanwhile. A changed file becomes a new node, since the kernel keeps what it knows of the old one (pages and, with the
writeback cache, the size). Host files are looked at in worker threads: a disk may be slow, and a symbolic link may lead
back into the mount.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import trio

from qedfuse.errors import QedfuseError, describe
from qedfuse.image import Image
from qedfuse.mounted import MountedImage
from qedfuse.peek import FileKey, FileMark, Peek, Peeker, key_of, mark_of

ROOT = 1
SUFFIX = ".qed"
SHOWN_SUFFIX = ".raw"

#: Up to so many files keep their inode numbers for as long as they exist, even if the kernel forgets them.
_MANY = 4096

_log = logging.getLogger("qedfuse")


class Node:
    """A raw file. `fixed`: its image stays open. `stale`: somebody else changed or replaced the image's file.

    `key` and `mark` are the file and its state when it was last looked at; `lookups` counts the kernel's references.
    """

    __slots__ = ("fixed", "id", "key", "lookups", "mark", "mounted", "stale")

    def __init__(self, id: int, mounted: MountedImage, key: FileKey, mark: FileMark, *, fixed: bool) -> None:
        self.id = id
        self.mounted = mounted
        self.key = key
        self.mark = mark
        self.fixed = fixed
        self.lookups = 0
        self.stale = False

    def is_at(self, peek: Peek) -> bool:
        """Whether `peek` saw this node's file as we know it."""
        if self.key != key_of(peek.status):
            return False
        ours = self.mounted.busy or peek.time <= self.mounted.closed_at  # it has changed since, but by us
        return ours or mark_of(peek.status) == (self.mounted.mark or self.mark)


class Entry(NamedTuple):
    """A name in the directory. `peek` is None for an image of the command line: it is open."""

    name: bytes
    node: Node
    peek: Peek | None


class Tree:
    """The files of a mount, by inode number and by name.

    `root`: the one image that is the mount's root, None for a directory. `make` makes the MountedImage of a path in one
    of the source `directories`; `mountpoint` is where the kernel shows the tree.
    """

    def __init__(
        self,
        directories: Iterable[str] = (),
        make: Callable[[str], MountedImage] | None = None,
        mountpoint: str = "",
    ) -> None:
        self.root: Node | None = None
        self.directories = list(directories)
        self._make = make
        self._nodes: dict[int, Node] = {}
        self._by_key: dict[FileKey, Node] = {}
        self._fixed: dict[bytes, Node] = {}
        self._peeker = Peeker(mountpoint)
        self._next_id = ROOT + 1
        self._missing: set[str] = set()

    # -- images of the command line -----------------------------------------------------------------------------------

    def set_root(self, mounted: MountedImage, image: Image) -> None:
        """Show one open image as the root."""
        self.root = self._add_fixed(ROOT, mounted, image)

    def add(self, mounted: MountedImage, image: Image) -> None:
        """Show an open image in the directory. Raises QedfuseError if another one has its name there."""
        name = os.fsencode(shown_name(os.path.basename(mounted.path)))
        if name in self._fixed:
            other = self._fixed[name].mounted.path
            raise QedfuseError(mounted.path, f"and {other} would both be shown as {os.fsdecode(name)}", errno.EEXIST)
        self._fixed[name] = self._add_fixed(self._take_id(), mounted, image)

    def _add_fixed(self, id: int, mounted: MountedImage, image: Image) -> Node:
        status = image.storage.stat()
        node = Node(id, mounted, key_of(status), mark_of(status), fixed=True)
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
        found = await trio.to_thread.run_sync(self._find, os.fsdecode(name))
        return self._to_entry(name, *found) if found else None

    async def entries(self) -> list[Entry]:
        """All there is, by name. Forgets what is gone and unknown to the kernel."""
        result = [Entry(name, node, None) for name, node in self._fixed.items()]
        if self.directories:
            found = await trio.to_thread.run_sync(self._scan)
            result += [
                self._to_entry(name, path, peek) for name, (path, peek) in found.items() if name not in self._fixed
            ]
            self._prune({key_of(peek.status) for _, peek in found.values()})
        result.sort(key=lambda entry: entry.name)
        return result

    async def look(self, node: Node) -> Peek:
        """A look at a node whose image is not open. Raises OSError(ESTALE) if the file is another one by now."""
        peek = await trio.to_thread.run_sync(self._peeker.look, node.mounted.path)
        if peek is None or not node.is_at(peek):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return peek

    async def acquire(self, node: Node, *, to_write: bool) -> Image:
        """The node's open image; to be released with `node.mounted.release()`.

        Raises OSError(ESTALE) if the file is another one by now, and what `open_image` raises.
        """
        if node.mounted.opened is None:
            await self.look(node)
        image = await node.mounted.acquire(to_write=to_write)
        if node.mounted.key() != node.key:
            node.mounted.release()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return image

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

    # -- the host's directories ---------------------------------------------------------------------------------------

    def _to_entry(self, name: bytes, path: str, peek: Peek) -> Entry:
        key = key_of(peek.status)
        node = self._by_key.get(key)
        if node is not None and not node.fixed:
            if node.is_at(peek):
                node.mounted.path = path  # it may have been renamed
            else:
                node.stale = True
                node = None
        if node is None:
            assert self._make is not None
            node = Node(self._take_id(), self._make(path), key, mark_of(peek.status), fixed=False)
            self._nodes[node.id] = self._by_key[key] = node
        return Entry(name, node, peek)

    def _find(self, name: str) -> tuple[str, Peek] | None:
        if not name.endswith(SHOWN_SUFFIX):
            return None
        stem = name.removesuffix(SHOWN_SUFFIX)
        for directory in self.directories:
            for candidate in (stem + SUFFIX, stem):
                if stem and shown_name(candidate) == name:
                    path = os.path.join(directory, candidate)
                    peek = self._peeker.look(path)
                    if peek is not None and _is_shown(candidate, peek):
                        return path, peek
        return None

    def _scan(self) -> dict[bytes, tuple[str, Peek]]:
        """Every image of the directories by shown name; a name in an earlier directory hides that in a later one, and
        NAME.qed hides NAME."""
        found: dict[bytes, tuple[str, Peek]] = {}
        for directory in self.directories:
            here: dict[bytes, tuple[str, Peek]] = {}
            for candidate in self._list(directory):
                path = os.path.join(directory, candidate)
                peek = self._peeker.look(path)
                if peek is None or not _is_shown(candidate, peek):
                    continue
                name = os.fsencode(shown_name(candidate))
                if name not in here or candidate.endswith(SUFFIX):
                    here[name] = path, peek
            found = here | found
        return found

    def _list(self, directory: str) -> Iterator[str]:
        try:
            with os.scandir(directory) as entries:
                names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False) or entry.is_symlink()]
        except OSError as error:
            if directory not in self._missing:
                self._missing.add(directory)
                _log.error("%s", describe(error, directory))
            return
        self._missing.discard(directory)
        yield from names

    def _prune(self, present: set[FileKey]) -> None:
        for node in self.nodes:
            if node.stale or node.key not in present:
                self._drop(node)
        self._peeker.keep_only(present)

    def _drop(self, node: Node) -> None:
        """Forget a node, unless somebody still refers to it."""
        if not node.fixed and node.lookups <= 0 and not node.mounted.busy:
            del self._nodes[node.id]
            if self._by_key.get(node.key) is node:
                del self._by_key[node.key]

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1


def shown_name(name: str) -> str:
    """The raw file's name for an image file's: NAME.raw for NAME.qed, else the full name and .raw."""
    stem = name.removesuffix(SUFFIX)
    return (stem or name) + SHOWN_SUFFIX


def _is_shown(name: str, peek: Peek) -> bool:
    """Whether a file is shown: by its name, valid or not, or by what it begins with."""
    return peek.is_qed or (name.endswith(SUFFIX) and name != SUFFIX)
