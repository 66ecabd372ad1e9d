"""A look at an image without opening it: the 64 bytes of its header. Blocks: to be called in a thread of `lookups.py`.

A directory of thousands of images is listed by this alone, and what a look found is kept until the file changes. What
stands in the directory is not to be trusted: symbolic links are walked (`walk.py`), and one that leads into a qedfuse
mount, like a file of such a mount, is not there.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from typing import NamedTuple

from qedfuse.errors import FormatError, UnsupportedError
from qedfuse.host.file_id import FileId, FileMark
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.lookups import cannot_tell
from qedfuse.host.waiting import run_blocking
from qedfuse.host.walk import Walk
from qedfuse.qed.header import Header, NotQedError
from qedfuse.qed.header_io import read_fields


class Peek(NamedTuple):
    """What a look found. `is_qed`: it begins as QED does; `header`: None if it cannot be read or is not valid.

    `time`: when the look began (`time.monotonic`). `writable`: the file may be written by this process.
    """

    time: float
    status: os.stat_result
    is_qed: bool
    header: Header | None
    writable: bool

    @property
    def size(self) -> int:
        """Bytes of the raw file; 0 if the header does not tell."""
        return self.header.image_size if self.header else 0


class _Known(NamedTuple):
    mark: FileMark
    is_qed: bool
    header: Header | None


class Peeker:
    """Looks at images, and remembers. Safe to use from several threads."""

    def __init__(self) -> None:
        self._known: dict[FileId, _Known] = {}

    def look(self, path: str) -> Peek | None:
        """What is at `path`; None if it is no regular file, or nothing. Raises OSError if that cannot be told."""
        directory, name = os.path.split(path)
        try:
            with Walk() as walk:
                walk.start(directory)
                return self.look_in(walk, name)
        except OSError as error:
            if cannot_tell(error):
                raise
            return None

    def look_in(self, directory: Walk, name: str) -> Peek | None:
        """The same, by a name in a directory."""
        now = time.monotonic()
        try:
            with directory.branch() as walk:
                return self._look_at(walk.follow(name), now)
        except OSError as error:
            if cannot_tell(error):
                raise
            return None

    def _look_at(self, pin: int, now: float) -> Peek | None:
        status = os.fstat(pin)
        if not stat.S_ISREG(status.st_mode):
            return None
        path = f"/proc/self/fd/{pin}"
        key = FileId.of(status)
        known = self._known.get(key)
        if known is None or known.mark != FileMark.of(status):
            known = self._known[key] = _Known(FileMark.of(status), *_read_header(path))
        writable = os.access(path, os.W_OK, effective_ids=True)
        return Peek(now, status, known.is_qed, known.header, writable)

    def keep_only(self, keys: Iterable[FileId]) -> None:
        """Forget files that are gone."""
        self._known = {key: self._known[key] for key in keys if key in self._known}


def _read_header(path: str) -> tuple[bool, Header | None]:
    """Whether there is a QED image, and its header. Raises OSError if that cannot be told."""
    try:
        storage = FileStorage.open(path, False)
        try:
            return True, run_blocking(read_fields(storage))
        finally:
            os.close(storage.fileno())
    except (FormatError, UnsupportedError) as error:
        return not isinstance(error, NotQedError), None
    except OSError as error:
        if cannot_tell(error):
            raise
        return False, None
