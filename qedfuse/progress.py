"""How far long work is: of a command on a closed image, and of a job on a mount."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

#: Told how far work is, again and again: what is done, and the total, in one unit of its own (bytes, clusters, table
#: entries). It may begin anew at 0, for another pass. Must return soon, and not raise.
Report = Callable[[int, int], None]


class Progress(NamedTuple):
    """`done` of `total`, as a `Report` tells it."""

    done: int
    total: int

    @property
    def percentage(self) -> float:
        """0 to 100; of nothing, all is done."""
        return 100 * self.done / self.total if self.total else 100.0
