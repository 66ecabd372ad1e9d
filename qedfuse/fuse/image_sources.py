"""The host's directories whose images a mount shows: which names there are, and what is behind them.

Host files are looked at in threads of their own (`lookups.py`), each directory by itself: one that does not answer
keeps no other one from being listed. Names that were seen in it are not looked for in those behind it, which it would
hide: they would be other images.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import trio

from qedfuse.chain.header_peek import Peek, Peeker
from qedfuse.host.file_id import FileId
from qedfuse.host.lookups import NoAnswerError, cannot_tell, look
from qedfuse.host.walk import LeadsBackError, Walk
from qedfuse.text import printable

SUFFIX = ".qed"
SHOWN_SUFFIX = ".raw"

#: How often a directory is listed when something in it leads to one more host that does not answer.
_ATTEMPTS = 3

_log = logging.getLogger("qedfuse")


class Found(NamedTuple):
    """An image of a directory. `peek`: what a look at it has found."""

    path: str
    peek: Peek


class _Listing(NamedTuple):
    """Of one directory: its images by shown name, and names of links that lead to hosts that do not answer."""

    images: dict[bytes, Found]
    unknown: set[bytes]


class Sources:
    """The source directories. A name in an earlier one hides that in a later one.

    `hidden`: images that are not shown (at the last listing), and those that hide them, by path.
    """

    def __init__(self, directories: Iterable[str] = ()) -> None:
        self.directories = list(directories)
        self.hidden: dict[str, str] = {}
        self._peeker = Peeker()
        self._missing: set[str] = set()
        self._seen: dict[str, set[bytes]] = {directory: set() for directory in self.directories}

    def __bool__(self) -> bool:
        return bool(self.directories)

    async def look(self, path: str) -> Peek | None:
        """What is at `path` now. Raises OSError if its host does not answer."""
        return await look(partial(self._peeker.look, path))

    async def find(self, name: bytes) -> Found | None:
        """The image that is shown as `name`. Raises OSError if it may be on a host that does not answer."""
        for directory in self.directories:
            seen = self._seen[directory]
            try:
                found = await look(partial(self._find, directory, os.fsdecode(name)))
            except NoAnswerError as error:
                self._note_missing(directory, error.message)
                if name in seen:
                    raise NoAnswerError(directory) from None
                continue
            if found:
                seen.add(name)
                return found
            seen.discard(name)
        return None

    async def list(self, fixed: Mapping[bytes, tuple[str, FileId]]) -> tuple[dict[bytes, Found], bool]:
        """All images by shown name, but for those whose names are `fixed`, to a path and its file; and whether these
        are all: not if something has not answered."""
        listings: dict[str, _Listing | None] = {}
        async with trio.open_nursery() as nursery:
            for directory in self.directories:
                nursery.start_soon(self._list_into, listings, directory)
        result: dict[bytes, Found] = {}
        shown: dict[bytes, tuple[str, FileId | None]] = {**fixed}
        hidden = {}
        for directory in self.directories:
            listing = listings[directory]
            if listing is not None:
                self._seen[directory] = set(listing.images) | (listing.unknown & self._seen[directory])
                for name, found in listing.images.items():
                    key = FileId.of(found.peek.status)
                    if name not in shown:
                        result[name] = found
                        shown[name] = found.path, key
                    elif shown[name][1] != key:
                        hidden[found.path] = shown[name][0]
            for name in self._seen[directory]:
                shown.setdefault(name, (directory, None))
        self._note_hidden(hidden)
        return result, not any(listing is None or listing.unknown for listing in listings.values())

    async def _list_into(self, listings: dict[str, _Listing | None], directory: str) -> None:
        """A link that leads to a host that does not answer holds up the first attempt, and is left out of the next."""
        for _ in range(_ATTEMPTS):
            try:
                listings[directory] = await look(partial(self._scan, directory))
                return
            except NoAnswerError as error:
                reason = error.message
        self._note_missing(directory, reason)
        listings[directory] = None

    async def statvfs(self) -> os.statvfs_result:
        """The space of the file system with the first directory that answers."""
        error: OSError = NoAnswerError()
        for directory in self.directories:
            try:
                return await look(partial(_statvfs, directory))
            except OSError as problem:
                error = problem
        raise error

    def keep_only(self, keys: Iterable[FileId]) -> None:
        """Forget files that are gone."""
        self._peeker.keep_only(keys)

    # -- in threads ---------------------------------------------------------------------------------------------------

    def _find(self, directory: str, name: str) -> Found | None:
        if not name.endswith(SHOWN_SUFFIX):
            return None
        stem = name.removesuffix(SHOWN_SUFFIX)
        for candidate in (stem + SUFFIX, stem):
            if stem and shown_name(candidate) == name:
                path = os.path.join(directory, candidate)
                peek = self._peeker.look(path)
                if peek is not None and _is_shown(candidate, peek):
                    return Found(path, peek)
        return None

    def _scan(self, directory: str) -> _Listing:
        """Every image of a directory; NAME.qed hides NAME."""
        found: dict[bytes, Found] = {}
        unknown: set[bytes] = set()
        try:
            with Walk() as walk:
                walk.start(directory)
                for candidate in _list(walk):
                    name = os.fsencode(shown_name(candidate))
                    try:
                        peek = self._peeker.look_in(walk, candidate)
                    except NoAnswerError:
                        unknown.add(name)
                        continue
                    if peek is None or not _is_shown(candidate, peek):
                        continue
                    if name not in found or candidate.endswith(SUFFIX):
                        found[name] = Found(os.path.join(directory, candidate), peek)
        except LeadsBackError as error:
            self._note_missing(directory, f"lies in a qedfuse mount ({error.mountpoint})")
            return _Listing({}, set())
        except OSError as error:
            if cannot_tell(error):
                raise
            self._note_missing(directory, os.strerror(error.errno or errno.EIO).lower())
            return _Listing({}, set())
        self._missing.discard(directory)
        return _Listing(found, unknown)

    # -- what is told -------------------------------------------------------------------------------------------------

    def _note_missing(self, directory: str, reason: str) -> None:
        if directory not in self._missing:
            self._missing.add(directory)
            _log.error("%s", printable(f"{directory}: {reason}"))

    def _note_hidden(self, hidden: dict[str, str]) -> None:
        for path, by in hidden.items():
            if self.hidden.get(path) != by:
                _log.warning("%s", printable(f"{path}: not shown, since {by} has its name in an earlier source"))
        self.hidden = hidden


def _statvfs(directory: str) -> os.statvfs_result:
    with Walk() as walk:
        walk.start(directory)
        return os.statvfs(walk.fd)


def _list(directory: Walk) -> list[str]:
    """The names of what may be an image."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory.fd)
    try:
        with os.scandir(fd) as entries:
            return [entry.name for entry in entries if entry.is_file(follow_symlinks=False) or entry.is_symlink()]
    finally:
        os.close(fd)


def shown_name(name: str) -> str:
    """The raw file's name for an image file's: NAME.raw for NAME.qed, else the full name and .raw."""
    stem = name.removesuffix(SUFFIX)
    return (stem or name) + SHOWN_SUFFIX


def _is_shown(name: str, peek: Peek) -> bool:
    """Whether a file is shown: by its name, valid or not, or by what it begins with."""
    return peek.is_qed or (name.endswith(SUFFIX) and name != SUFFIX)
