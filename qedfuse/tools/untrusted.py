"""A look at an image from a stranger: it must be consistent and stand alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from qedfuse.errors import CorruptError, UnsupportedError
from qedfuse.host.storage import read
from qedfuse.host.waiting import run_blocking
from qedfuse.tools.info import ImageInfo, info_of, opened

if TYPE_CHECKING:
    from qedfuse.host.file_storage import FileStorage
    from qedfuse.qed.header import Header

#: An untrusted image may declare at most this many bytes: what the default geometry can map.
DEFAULT_MAX_SIZE = 64 << 40
#: And its structure must be checked in this many seconds.
DEFAULT_TIME_LIMIT = 10.0


def read_untrusted(
    path: str, *, share: bool = False, max_size: int = DEFAULT_MAX_SIZE, time_limit: float = DEFAULT_TIME_LIMIT
) -> ImageInfo:
    """As `read_info`, for an image whose maker may mean harm.

    Opens nothing but the image; memory is bounded by the check, time by `time_limit` (seconds). Raises UnsupportedError
    for an image that refers to another file, declares more than `max_size` bytes, takes too long to check or is one of
    another format, too (whose reader would see something else), and CorruptError for one whose tables are not in order
    (leaked clusters are harmless) or that was not closed cleanly.
    """
    from qedfuse.chain.format_probe import PROBE_BYTES, other_format

    deadline = time.monotonic() + time_limit
    with opened(path, share=share) as storage:
        info = run_blocking(info_of(storage))
        if info.backing_name is not None:
            raise UnsupportedError(path, f"not to be trusted: it refers to another file, {info.backing_name!r}")
        other = other_format(run_blocking(read(storage, 0, min(PROBE_BYTES, storage.size()))))
        if other is not None:
            raise UnsupportedError(path, f"not to be trusted: it looks like a {other} image, too")
        if info.virtual_size > max_size:
            raise UnsupportedError(
                path, f"not to be trusted: it declares {info.virtual_size} bytes, more than {max_size} (--max-size)"
            )
        assert info.header is not None
        if info.header.needs_check:
            raise CorruptError(path, "not to be trusted: it was not closed cleanly; see qedfuse check -r all")
        _check(storage, info.header, deadline)
        return info


def _check(storage: FileStorage, header: Header, deadline: float) -> None:
    """The structural check, until `deadline` (`time.monotonic`)."""
    import trio

    from qedfuse.check.check import check_image
    from qedfuse.check.result import CheckResult

    async def run() -> CheckResult:
        with trio.fail_after(max(0.0, deadline - time.monotonic())):
            return await check_image(storage, header)

    try:
        result = trio.run(run)
    except trio.TooSlowError:
        raise UnsupportedError(storage.path, "not to be trusted: its tables take too long to check") from None
    if result.corruptions or result.check_errors:
        raise CorruptError(storage.path, f"not to be trusted: its tables are corrupt ({result.problems[0]})")
