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

    `guests`: counts guests' requests; a job has to wait while they come (None: there are no guests). `progress`: the
    latest; None before the first report.
    """

    #: While guests work, a job works for as long as it lets them work alone.
    _SHARE = 1.0
    #: Seconds for which a job gives way at most, after one step.
    _LONGEST_WAY = 0.1

    def __init__(self, *, rate: int | None = None, guests: Callable[[], int] | None = None) -> None:
        self.progress: Progress | None = None
        self._rate = rate
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
        began = now if self._began is None else self._began
        if self._rate is not None:
            self._due = max(self._due, began) + size / self._rate
            await self._sleep(lambda: self._due)
        if self._guests is not None:
            seen, self._seen = self._seen, self._guests()
            if seen != self._seen:
                end = trio.current_time() + min(self._SHARE * (now - began), self._LONGEST_WAY)
                await self._sleep(lambda: end)
        while self._paused and not self._cancelled:
            await self._changed.wait()
        await trio.lowlevel.checkpoint()
        if self._cancelled:
            raise JobCancelled
        self._began = trio.current_time()

    async def _sleep(self, end: Callable[[], float]) -> None:
        """Until then, which may change meanwhile, or the job is to end."""
        while trio.current_time() < end() and not self._cancelled:
            with trio.move_on_at(end()):
                await self._changed.wait()

    # -- the others' side ---------------------------------------------------------------------------------------------

    @property
    def rate(self) -> int | None:
        """Bytes in a second at most; None: no limit. A change holds from the step that goes on now: what was owed at
        the old rate is not waited for any longer."""
        return self._rate

    @rate.setter
    def rate(self, rate: int | None) -> None:
        if rate != self._rate:
            self._rate = rate
            self._due = 0.0
            self._tell()

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self) -> None:
        """The job stops at the end of its step, until `resume`."""
        self._paused = True
        self._tell()

    def resume(self) -> None:
        self._paused = False
        self._tell()

    def cancel(self) -> None:
        """The job ends at the end of its step, also if it is paused."""
        self._cancelled = True
        self._tell()

    async def watch(self, period: float) -> AsyncIterator[Progress]:
        """The progress as soon as there is any, and then whenever it has changed, but only every `period` seconds.
        Never ends by itself."""
        told: Progress | None = None
        while True:
            while self.progress is None or self.progress == told:
                await self._changed.wait()
            told = self.progress
            yield told
            await trio.sleep(period)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
