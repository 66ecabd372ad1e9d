"""How far a long job is."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from qedfuse.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID

#: Seconds that work must take before a terminal shows its progress.
_DELAY = 1.0


class Bar:
    """A job's progress on a terminal's stderr, once it takes long."""

    def __init__(self, what: str, wanted: bool) -> None:
        self._what = what
        self._wanted = wanted
        self._start = time.monotonic()
        self._progress: RichBar | None = None
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        if not self._wanted or time.monotonic() - self._start < _DELAY:
            return
        if self._progress is None:
            from rich.console import Console
            from rich.progress import Progress as RichBar

            self._progress = RichBar(console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task(self._what)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, description=self._what, completed=done, total=total)

    def describe(self, what: str) -> None:
        """What is being done from now on."""
        self._what = what

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class Percentage:
    """A job's progress as qemu-img's -p shows it: a line on stdout that is overwritten, for people and for scripts."""

    def __init__(self) -> None:
        self._shown = -1.0

    def __call__(self, done: int, total: int) -> None:
        percentage = Progress(done, total).percentage
        if percentage >= self._shown + 1 or self._shown < percentage == 100:
            self._shown = percentage
            click.echo(f"    ({percentage:.2f}/100%)\r", nl=False)
            sys.stdout.flush()

    def describe(self, what: str) -> None:
        """It has no words."""

    def close(self) -> None:
        if self._shown >= 0:
            click.echo()
