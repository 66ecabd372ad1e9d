"""A job: long work on an open image, next to the guests that use it.

A job does its work in steps of bounded size, and asks its control after each: there it is paused, slowed down, ended,
and made to give way to guests. It holds nothing meanwhile that a guest may want: no range of clusters, and no slot of a
mount (`fuse/image_slot.py`), which it takes for each step, like any request, and so finds the image that is there by
then. What one step has done is complete: a job that ends between two leaves nothing half done.

No clock but trio's, no I/O.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

import trio

from qedfuse.progress import Progress


class JobCancelled(Exception):
    """The job was told to end. Raised by `JobControl.step`, for the job to pass on."""


class Job(Protocol):
    """`kind`: what it does, in one word, for people and programs ("stream", "commit")."""

    @property
    def kind(self) -> str: ...

    async def run(self, control: JobControl) -> None:
        """All of it. Raises OSError if it fails, and what `control.step` raises; the image is in order in any case, and
        the job can be run again."""


class JobControl:
    """Between a job and those that watch and steer it. Belongs to one event loop.

    `rate`: bytes in a second at most; None: no limit. May be changed at any time. `guests`: counts guests' requests; a
    job has to wait while they come (None: there are no guests). `progress`: the latest.
    """

    #: While guests work, a job works for as long as it lets them work alone.
    _SHARE = 1.0
    #: Seconds for which a job gives way at most, after one step.
    _LONGEST_WAY = 0.1

    def __init__(self, *, rate: int | None = None, guests: Callable[[], int] | None = None) -> None:
        self.rate = rate
        self.progress = Progress(0, 0)
        self._guests = guests
        self._seen = guests() if guests else 0
        self._began: float | None = None  # the step that goes on now
        self._due = 0.0  # when the rate lets the next step begin
        self._cancelled = False
        self._paused = False
        self._changed = trio.Event()

    # -- the job's side -----------------------------------------------------------------------------------------------

    def report(self, done: int, total: int) -> None:
        """A `Report`: how far the job is."""
        self.progress = Progress(done, total)
        self._tell()

    async def step(self, size: int) -> None:
        """A step is done that moved `size` bytes: returns when the next one may begin. A checkpoint.

        Raises JobCancelled if the job is to end.
        """
        now = trio.current_time()
        took = 0.0 if self._began is None else now - self._began
        if self.rate is not None:
            self._due = max(self._due, self._began or now) + size / self.rate
            await self._sleep(self._due - now)
        if self._guests is not None:
            seen, self._seen = self._seen, self._guests()
            if seen != self._seen:
                await self._sleep(min(self._SHARE * took, self._LONGEST_WAY))
        while self._paused and not self._cancelled:
            await self._changed.wait()
        await trio.lowlevel.checkpoint()
        if self._cancelled:
            raise JobCancelled
        self._began = trio.current_time()

    async def _sleep(self, seconds: float) -> None:
        """Unless the job is to end."""
        end = trio.current_time() + seconds
        while trio.current_time() < end and not self._cancelled:
            with trio.move_on_at(end):
                await self._changed.wait()

    # -- the others' side ---------------------------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self) -> None:
        """The job stops at the end of its step, until `resume`."""
        self._paused = True
        self._tell()

    def resume(self) -> None:
        self._paused = False
        self._began = None  # the pause was no work
        self._tell()

    def cancel(self) -> None:
        """The job ends at the end of its step, also if it is paused."""
        self._cancelled = True
        self._tell()

    async def watch(self, period: float) -> AsyncIterator[Progress]:
        """The progress now, and then whenever it has changed, but only every `period` seconds. Never ends by itself."""
        while True:
            told = self.progress
            yield told
            await trio.sleep(period)
            while self.progress == told:
                await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
