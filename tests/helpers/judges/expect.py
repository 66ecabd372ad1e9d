"""Expecting an OSError by its errno."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def raises_errno(*codes: int) -> Iterator[None]:
    """The block must end with an OSError of one of these codes."""
    caught: OSError | None = None
    try:
        yield
    except OSError as error:
        caught = error
    names = [errno.errorcode[code] for code in codes]
    assert caught is not None and caught.errno in codes, f"{caught!r} instead of one of {names}"
