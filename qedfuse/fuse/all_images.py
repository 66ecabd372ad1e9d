"""All images of a mount at once: flushed, and closed in the end. One that cannot be, yet or ever, keeps no other one
waiting.

The host of an image may not answer. What waits for it cannot be ended, so it is left behind, in time or when a signal
asks for it, and named.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio

import qedfuse.host.lookups
from qedfuse.fuse.mounted_image import MountedImage
from qedfuse.host.lookups import NoAnswerError
from qedfuse.text import describe

#: Seconds after which waiting clients are told what cannot be written yet.
_TELL_AFTER = 3.0
#: Seconds for which an image is waited for whose host may not answer, when users are not waited for any longer.
_LAST_PATIENCE = 5.0

_log = logging.getLogger("qedfuse")


class Hurry:
    """How much of it there is in closing. `killed`: it waits for no host that may not answer. `now`: for nothing."""

    def __init__(self) -> None:
        self.killed = trio.Event()
        self.now = trio.Event()


async def flush_all(images: Sequence[MountedImage], nursery: trio.Nursery) -> tuple[list[str], list[str]]:
    """Make durable what was completed in the open ones. Returns what went wrong, and what of that may be mended.
    Those that are open for reading have nothing to lose: nothing waits for their hosts.

    `nursery`: where a flush goes on that takes too long, as its host does not answer.
    """
    problems: list[str] = []
    unwritten: list[str] = []
    waiting = {image for image in images if image.opened is not None and image.opened.writable}
    flushed = trio.Event()
    local_flushed = trio.Event()

    def note(problem: str, *, mendable: bool) -> None:
        problems.append(problem)
        if mendable:
            unwritten.append(problem)
        _log.error("%s", problem)

    def tell() -> None:
        if not waiting:
            flushed.set()
        if not any(mounted.local for mounted in waiting):
            local_flushed.set()

    async def flush(mounted: MountedImage) -> None:
        try:
            if mounted.opened is not None:
                async with mounted.slot as image:
                    await image.flush()
        except OSError as error:
            broken = mounted.opened is None or mounted.opened.failed is not None
            note(describe(error, mounted.path), mendable=not broken)
        finally:
            waiting.discard(mounted)
            tell()

    for mounted in list(waiting):
        nursery.start_soon(flush, mounted)
    tell()
    await local_flushed.wait()
    with trio.move_on_after(qedfuse.host.lookups.PATIENCE):
        await flushed.wait()
    for mounted in waiting:
        note(describe(NoAnswerError(mounted.path)), mendable=True)
    return problems, unwritten


async def close_all(
    images: Sequence[MountedImage], hurry: Hurry, tell: Callable[[str], Awaitable[None]]
) -> list[MountedImage]:
    """Close them. Returns those that were left behind. `tell` tells clients that they would wait for long."""
    async with trio.open_nursery() as outer:
        outer.start_soon(_tell_of_unwritten, images, tell)
        outer.start_soon(_leave_behind, images, hurry, outer.cancel_scope)
        async with trio.open_nursery() as nursery:
            for image in images:
                nursery.start_soon(image.close)
        outer.cancel_scope.cancel()
    return [image for image in images if image.open]


async def _tell_of_unwritten(images: Sequence[MountedImage], tell: Callable[[str], Awaitable[None]]) -> None:
    while True:
        await trio.sleep(_TELL_AFTER)
        problems = [describe(image.unwritten, image.path) for image in images if image.unwritten is not None]
        if problems:
            await tell("; ".join(problems))


async def _leave_behind(images: Sequence[MountedImage], hurry: Hurry, closing: trio.CancelScope) -> None:
    """End the closing when those that are not closed may never be, and there is hurry."""
    await hurry.killed.wait()
    with trio.move_on_after(_LAST_PATIENCE):
        await hurry.now.wait()
    while not hurry.now.is_set() and any(image.open and image.local for image in images):
        with trio.move_on_after(0.1):
            await hurry.now.wait()
    closing.cancel()
