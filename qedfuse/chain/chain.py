"""Chains of layers: an image, its backing file, that one's backing file, and so on, all read-only.

A chain is walked from the top down (open, lock, read the header, find the next name) and built from the bottom up, in
loops, so that its length costs no stack. Whatever goes wrong on the way, every file of it is closed again.

Only headers are read: the cost does not grow with the images.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import NamedTuple

import trio

from qedfuse.chain.backing import open_backing_file, resolve_backing, shown
from qedfuse.chain.format_probe import PROBE_BYTES, RAW, probe_format
from qedfuse.chain.link import Link, Reference, read_link
from qedfuse.chain.policy import ANY_BACKING, BackingPolicy
from qedfuse.chain.unfinished import UnfinishedError, describe_unfinished, refuse_unfinished
from qedfuse.errors import CorruptError, QedfuseError, UnsupportedError
from qedfuse.host import image_lock
from qedfuse.host.file_id import FileId
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.lookups import NoAnswerError, look
from qedfuse.host.remote_file import isolate
from qedfuse.host.storage import read
from qedfuse.host.walk import LeadsBackError, Walk
from qedfuse.layers.layer import Layer

#: Layers in a chain, the top one included. Each costs a descriptor, and a loop that no inode betrays must end, too.
MAX_DEPTH = 200


async def open_layer(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    share: bool = False,
    policy: BackingPolicy = ANY_BACKING,
) -> Layer:
    """A raw, QED or qcow2 image with its backing chain, read-only. The caller closes it.

    `format` None: probed. `share`: no locks are taken or honoured. `policy` is for backing files, not for `path`
    itself.

    Raises QedfuseError (in use, another format, corrupt header, backing file missing or refused, a loop), OSError of
    the host. On an error, and when cancelled, nothing stays open.
    """
    chain = Chain(share, policy)
    async with chain.closed_on_error():
        await chain.open_top(os.fspath(path), format, writable=False)
        return chain.build()


async def open_backing(
    image: str | os.PathLike[str],
    name: str,
    format: str | None = None,
    *,
    share: bool = False,
    policy: BackingPolicy = ANY_BACKING,
) -> Layer:
    """What an image at path `image` gets from `name` as its backing file's name: a layer with its chain, read-only.

    The image need not exist; if it does, it may not be part of the chain. Otherwise as `open_layer`, and `policy` is
    for this file, too.
    """
    chain = Chain(share, policy)
    async with chain.closed_on_error():
        with suppress(FileNotFoundError):
            chain.files.add(FileId.at(image))
        await chain.walk(Reference(os.fspath(image), name, format))
        return chain.build()


class _Claimed(NamedTuple):
    """A file of a chain, locked. `unfinished`: what is under way with it, for a message."""

    storage: FileStorage
    file: FileId
    unfinished: str | None


class Chain:
    """A chain while it is being opened. `files`: the files that may not occur (again) further down.

    `isolated`: see `opening.open_for_use`.
    """

    def __init__(self, share: bool, policy: BackingPolicy, *, isolated: bool = False) -> None:
        self.links: list[Link] = []
        self.files: set[FileId] = set()
        self._share = share
        self._policy = policy
        self._isolated = isolated
        self._opened: list[FileStorage] = []

    @asynccontextmanager
    async def closed_on_error(self) -> AsyncIterator[None]:
        """Close every file of the chain if the block does not come to its end, whatever becomes of closing one."""
        try:
            yield
        except BaseException:
            with trio.CancelScope(shield=True):
                for storage in self._opened:
                    with suppress(OSError):
                        await storage.close()
            raise

    async def open_top(self, path: str, format: str | None, *, writable: bool, in_directory: bool = False) -> None:
        """Open the image at `path` and walk its chain. `in_directory`: see `opening.open_for_use`."""

        open_file = partial(_open_entry if in_directory else FileStorage.open, path, writable)
        patience = None if in_directory else math.inf
        try:
            reference = await self._open(open_file, None, format, patience)
        except NoAnswerError:
            raise NoAnswerError(path) from None
        await self.walk(reference)

    async def walk(self, reference: Reference | None) -> None:
        """Open what `reference` names, what that names, and so on."""
        while reference is not None:
            image, name, format = reference
            if len(self.links) >= MAX_DEPTH:
                raise UnsupportedError(image, f"the chain of backing files has more than {MAX_DEPTH} images")
            path = resolve_backing(image, name)
            try:
                reference = await self._open(partial(open_backing_file, image, path, self._policy), image, format)
            except NoAnswerError as error:
                message = f"cannot open its backing file {shown(path)}: {error.message}"
                raise QedfuseError(image, message, error.errno) from None

    async def _open(
        self, open_file: Callable[[], FileStorage], image: str | None, format: str | None, patience: float | None = None
    ) -> Reference | None:
        """Open what `image` names, as the next link. Returns what its header refers to."""
        claimed = await look(partial(self._claim, open_file, image), discard=_drop, patience=patience)
        storage = claimed.storage
        self._opened.append(storage)
        self.files.add(claimed.file)
        if format is None:
            format = probe_format(await read(storage, 0, min(PROBE_BYTES, storage.size())), storage.path)
        if format == RAW and claimed.unfinished is not None:  # it is longer than the disk
            raise UnfinishedError(storage.path, claimed.unfinished)
        header, reference = await read_link(storage, format)
        self.links.append(Link(storage, header))
        return reference

    def _claim(self, open_file: Callable[[], FileStorage], image: str | None) -> _Claimed:
        """Open and lock a file of the chain. Blocks."""
        storage = open_file()
        try:
            if self._isolated:
                storage = isolate(storage)
            found = FileId.of(storage.stat())
            if found in self.files:
                message = f"its backing file {shown(storage.path)} is part of this chain already (a loop)"
                raise CorruptError(image or storage.path, message, errno.ELOOP)
            if not self._share:
                image_lock.lock(storage.fileno(), storage.path, writable=storage.writable)
            if storage.writable:
                refuse_unfinished(storage.fileno(), storage.path)
            unfinished = describe_unfinished(storage.fileno(), storage.path)
        except BaseException:
            image_lock.close(storage.fileno())
            raise
        return _Claimed(storage, found, unfinished)

    def build(self) -> Layer:
        """The top layer, with the others below it."""
        return self._build(self.links)

    def build_backing(self) -> Layer | None:
        """The layer below the top one, if there is one."""
        return self._build(self.links[1:]) if len(self.links) > 1 else None

    def _build(self, links: list[Link]) -> Layer:
        layer = links[-1].make(None)
        for link in reversed(links[:-1]):
            layer = link.make(layer)
        return layer


def _open_entry(path: str, writable: bool) -> FileStorage:
    """Open an image by a name that was found in a directory, a symbolic link perhaps. Blocks."""
    directory, name = os.path.split(path)
    with Walk() as walk:
        walk.start(directory)
        try:
            pin = walk.follow(name)
        except LeadsBackError as error:
            raise UnsupportedError(path, f"leads into a qedfuse mount ({shown(error.mountpoint)})") from None
        return FileStorage.open(path, writable, pin=pin)


def _drop(claimed: _Claimed) -> None:
    image_lock.close(claimed.storage.fileno())
