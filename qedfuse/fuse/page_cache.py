"""Whether the pages that the kernel has cached of a raw file still show what its image says.

The kernel keeps them when the file is closed, and drops them at an open that does not ask for them to be kept. They
are right as long as every file of the chain is as it was when they were read: the same files, unchanged. Times of
change can be set, but ctime cannot. What is written through the mount goes through the cache, so our own changes do no
harm.

A change within a tick of the host's clock after another one may leave no trace: a state so fresh is not relied on.
Stores through mmap(2) that leave no trace (into a page that is dirty already, or on tmpfs) cannot be noticed.
Block devices have no time of change: they are as they were for as long as they are open, and locked.
"""

from __future__ import annotations

import os
import stat
import time

from qedfuse.host.file_id import FileId, FileMark
from qedfuse.layers.layer import layers_of
from qedfuse.qed.image import Image

#: Nanoseconds: more than any host's clock tick; the same on file systems that keep whole seconds (or pairs of them).
TICK = 20_000_000
_COARSE_TICK = 2_000_000_000
_SECOND = 1_000_000_000
#: Seconds for which no open keeps pages after one that did not: the kernel may not have got that answer yet.
_DROPPING = 1.0

#: Of a file that has no time of change: in which opening it was seen.
_Opening = object
_State = tuple[FileId, FileMark | _Opening]


class CachedPages:
    """What the kernel may have cached of one raw file: of which state of the chain's files. It begins with nothing."""

    __slots__ = ("_dropping", "_opening", "_ours", "_outdated", "_stale", "_states")

    def __init__(self) -> None:
        self._states: list[_State | None] = []  # from the top down; None: as nothing ever is
        self._ours = False  # the top one is being written by us
        self._opening = object()
        self._outdated = False  # a file has changed since the image was opened
        self._stale = False  # since then no open has had the pages dropped: one may have been refused
        self._dropping = 0.0

    def note_open(self, image: Image) -> None:
        """The image was opened, and nothing has been changed through it."""
        self._ours = False
        self._opening = object()
        self.note_changes(image)
        self._ours = image.writable
        self._stale |= self._outdated  # what was read through the image as it was may be cached
        self._outdated = False

    def may_keep(self, image: Image) -> bool:
        """Whether an open of the raw file, which is answered now, may leave the kernel its pages."""
        self.note_changes(image)
        if self._stale:
            self._stale = False
            self._dropping = time.monotonic() + _DROPPING
        return time.monotonic() >= self._dropping

    def note_changes(self, image: Image) -> None:
        """Have a look at what others may have changed until now. Before the first open nothing is cached."""
        found = self._look_at(image)
        if self._states and not self._is_known(found):
            self._stale = self._outdated = True
        self._states = found

    def note_replaced(self, image: Image) -> None:
        """`image` has taken the place of another one, with the same content: what is cached of that is right still."""
        self._states = self._look_at(image)
        self._ours = image.writable

    def note_writing(self) -> None:
        """The image was opened for writing."""
        self._ours = True

    def is_current(self, image: Image) -> bool:
        """Whether the open files are as they were when the image was opened, but for what we write ourselves."""
        return not self._outdated and self._is_known(self._look_at(image))

    def _is_known(self, found: list[_State | None]) -> bool:
        skipped = 1 if self._ours else 0
        return None not in found[skipped:] and found[skipped:] == self._states[skipped:]

    def note_own_change(self, status: os.stat_result) -> None:
        """The image's file is in a state to which we have brought it."""
        self._states[:1] = [self._state_of(status)]

    def _look_at(self, image: Image) -> list[_State | None]:
        return [self._state_of(layer.storage.stat()) for layer in layers_of(image)]

    def _state_of(self, status: os.stat_result) -> _State | None:
        if stat.S_ISBLK(status.st_mode):
            return FileId.of(status), self._opening
        return None if _is_fresh(status.st_ctime_ns) else (FileId.of(status), FileMark.of(status))


def _is_fresh(ctime_ns: int) -> bool:
    """Whether a file could change once more without another ctime."""
    return time.time_ns() - ctime_ns < (TICK if ctime_ns % _SECOND else _COARSE_TICK)
