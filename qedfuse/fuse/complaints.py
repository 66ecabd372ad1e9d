"""Errors at the edge: an errno for the kernel, and a line in the log unless the same was said a moment ago."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Container

from qedfuse.errors import InUseError, QedfuseError, leaves
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

    def errno_of(self, error: Exception, action: str, *, broken: bool = False) -> int:
        """What the kernel is told instead of `error`.

        `broken`: an image that is not valid, or that qedfuse does not support, is EIO whatever its error's errno says.
        An exception that is no OSError is a bug: EIO, and its traceback in the log.
        """
        causes = list(leaves(error))
        bug = next((cause for cause in causes if not isinstance(cause, OSError)), None)
        if bug is not None:
            self._say(f"{action}: internal error: {type(bug).__name__}: {bug}; this is a bug", error)
            return errno.EIO
        cause = causes[0]
        assert isinstance(cause, OSError)
        if broken and isinstance(cause, QedfuseError) and not isinstance(cause, InUseError):
            code = errno.EIO
        else:
            code = cause.errno or errno.EIO
        if code not in _SILENT:
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
        cause = next(leaves(error))
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
