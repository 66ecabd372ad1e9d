"""A file, or what has files of its own, that is open for a block."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Protocol, TypeVar


class Closable(Protocol):
    async def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


@asynccontextmanager
async def closing(file: T) -> AsyncIterator[T]:
    """`file`, which is closed when the block has ended. If the block fails it is that error that is raised, whatever
    comes of closing: a host that has failed once may well fail again, and would say less."""
    async with closed_on_error(file):
        yield file
    await file.close()


@asynccontextmanager
async def closed_on_error(file: Closable) -> AsyncIterator[None]:
    """As `closing`, but `file` stays open when the block has come to its end."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            await file.close()
        raise
