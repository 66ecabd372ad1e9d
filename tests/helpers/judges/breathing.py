"""How long other tasks of the event loop wait for their turn."""

from __future__ import annotations

import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def breathing(most: float) -> AsyncIterator[list[float]]:
    """Other tasks run at least every `most` seconds of the loop's processor time while the block does its work. Gives
    the times that one has waited."""
    gaps: list[float] = []

    async def watch() -> None:
        last = time.thread_time()
        while True:
            await trio.lowlevel.checkpoint()
            now = time.thread_time()
            gaps.append(now - last)
            last = now

    gc.collect()
    gc.freeze()  # what the tests before have left behind takes half a second to go through
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            yield gaps
            nursery.cancel_scope.cancel()
    finally:
        gc.unfreeze()
    assert max(gaps, default=0) < most
