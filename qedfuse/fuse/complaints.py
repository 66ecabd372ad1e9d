"""Errors at the edge: an errno for the kernel (`errnos.py`), and a line in the log unless that was said just now."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Container

from qedfuse.fuse.errnos import cause_of, errno_of
from qedfuse.text import describe

#: What is no news: the caller's own doing, or the kernel will ask again.
_SILENT = frozenset((errno.ESTALE, errno.EROFS, errno.EPERM, errno.EFBIG, errno.ENOENT))
#: Seconds before a line is repeated, and how many different ones are remembered.
_REPEAT_AFTER = 30.0
_REMEMBERED = 256
#: How many images that could not be opened are listed.
_LISTED = 100

_log = logging.getLogger("qedfuse")


class Complaints:
    """From exceptions to errnos. A guest that reads a bad cluster a million times does not fill the log."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def errno_of(self, error: Exception, action: str, *, broken: bool = False, quiet: bool = False) -> int:
        """What the kernel is told instead of `error`; see `errnos.errno_of`.

        A bug goes to the log with its traceback, and everything else unless it is no news, or `quiet`: for requests
        that say by an error what is so (a seek behind the last data, a hole that cannot be made).
        """
        cause = cause_of(error)
        code = errno_of(error, broken=broken)
        if not isinstance(cause, OSError):
            self._say(f"{action}: internal error: {type(cause).__name__}: {cause}; this is a bug", error)
        elif not quiet and code not in _SILENT:
            self._say(f"{action} failed: {describe(cause)}")
        return code

    def _say(self, line: str, bug: Exception | None = None) -> None:
        now = time.monotonic()
        if now - self._said.get(line, -_REPEAT_AFTER) < _REPEAT_AFTER:
            return
        if len(self._said) >= _REMEMBERED:
            self._said.clear()
        self._said[line] = now
        _log.error("%s", line, exc_info=bug)


class Unopened:
    """The images that could not be opened when that was last tried, and why; of very many the latest."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def note(self, path: str, error: Exception) -> None:
        cause = cause_of(error)
        self._reasons.pop(path, None)
        self._reasons[path] = describe(cause, path) if isinstance(cause, OSError) else f"{path}: internal error"
        if len(self._reasons) > _LISTED:
            del self._reasons[next(iter(self._reasons))]

    def forget(self, path: str) -> None:
        if self._reasons:
            self._reasons.pop(path, None)

    def status(self, paths: Container[str]) -> list[dict[str, str]]:
        """Those among `paths`, for `qedfuse status`."""
        return [{"filename": path, "error": why} for path, why in self._reasons.items() if path in paths]
