"""A host that is short of something for a moment: one call that looks at a file fails, and says nothing of the file."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

#: Too many open files (of the process, of the host), no memory, no thread.
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)

_CALLS = (*((os, name) for name in ("open", "stat", "fstat", "readlink", "dup", "scandir")), (builtins, "open"))


@contextmanager
def one_call_fails(number: int, code: int) -> Iterator[list[str]]:
    """In the block the call of this number, from 0, fails with this errno. The list has its name from then on."""
    hit: list[str] = []
    count = 0

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number + 1:
                hit.append(name)
                raise OSError(code, os.strerror(code))
            return call(*args, **kwargs)

        return attempt

    with pytest.MonkeyPatch.context() as patch:
        for module, name in _CALLS:
            patch.setattr(module, name, counted(name, getattr(module, name)))
        yield hit


def each_call_fails(code: int, *, least: int) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """For a loop whose body makes the same calls each time: what it is to enter, so that each of them fails once. There
    must be at least so many."""
    number = 0
    last: list[list[str]] = []

    @contextmanager
    def failing() -> Iterator[None]:
        with one_call_fails(number, code) as hit:
            last[:] = [hit]
            yield

    while True:
        yield failing
        if not last[0]:
            break
        number += 1
    assert number >= least, f"only {number} calls"
