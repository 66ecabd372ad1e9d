"""A process that writes to its part of a raw file, knows what must be there, and looks whether it is.

    python -m tests.helpers.mounts.diff_worker MODEL NUMBER OF TAIL CAPACITY

MODEL is a file that all of them map: what the raw file must read as. Orders come on standard input, an answer to each
goes to standard output, JSON, a line a time; `Worker.obey` names the orders. An answer has `wrong`: what reads as it
must not, and `error`, if a call has failed: errno, name and deed.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

from tests.helpers.judges.parts import Part
from tests.helpers.judges.shadow import SECTOR
from tests.helpers.mounts.diff_deeds import DEEDS, PROFILES, Failed, rounded
from tests.helpers.mounts.diff_handles import Handles
from tests.helpers.mounts.diff_sizes import SIZE_DEEDS, SizeDeeds

_LARGEST = 1 << 20


class Worker(SizeDeeds):
    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """One of: open(path, size, able, source), work(seed, count, profile), sync, compare(other, size),
        settle(size), closed(size), close, story(sectors)."""
        answer: dict[str, Any] = {"wrong": []}
        self._sectors = 0
        before = self._shadow.number
        function = getattr(self, f"do_{order.pop('do')}")
        try:
            answer["wrong"] = function(**order) or []
        except Failed as failure:
            answer["wrong"] = [str(failure)]
        except OSError as error:
            answer["error"] = [error.errno, str(error), self._shadow.last()]
        return {
            **answer,
            "deeds": self._shadow.number - before,
            "sectors": self._sectors,
            "size": self._size,
            "mixed": self._shadow.mixed,
        }

    # -- orders --------------------------------------------------------------------------------------------------------

    def do_open(self, path: str, size: int, able: list[str], source: list[str] | None = None) -> None:
        """`source`: another raw file of the mount, and a file that holds the same. Without `reopen` among the things
        that it is able to do, all that may be needed is opened now."""
        self._handles = Handles(path, self._tail, source[0] if source else None)
        if source:
            with open(source[1], "rb") as file:
                self._source = file.read()
        if self._random.random() < 0.5:  # so that a reader is there before the first writer
            self._handles.pread("reader", 0, SECTOR)
        if "reopen" not in able:
            self._handles.open_all()
        self._able = set(able)
        self._size = size
        self._sizes |= {size}
        self._check_size()

    def do_close(self) -> None:
        handles, self._handles = self._handles, None
        if handles:
            handles.close_all()

    def do_work(self, seed: str, count: int, profile: str) -> None:
        factor = PROFILES[profile]
        rnd = self._random = random.Random(f"{seed}/{self._number}")
        deeds = [
            name
            for name, (needs, often) in DEEDS.items()
            if needs <= self._able
            for _ in range(often * factor.get(name, 1))
        ]
        if self._number == 0 and "size" in self._able:
            deeds += [name for name, often in SIZE_DEEDS.items() for _ in range(often)]
        for _ in range(count):
            getattr(self, rnd.choice(deeds))()

    def do_sync(self) -> None:
        self.sync()

    def do_compare(self, other: int, size: int) -> list[str]:
        """All that worker `other` has written must read as the model says."""
        wrong: list[str] = []
        if self._number:
            self._size = size
        kind = self._random.choice(("plain", "plain", "direct", "map"))
        if kind == "map" and "map" not in self._able:
            kind = "plain"
        for low, high in Part(other, self._of, self._tail).all(size):
            for start in range(low, high, _LARGEST):
                end = min(high, start + _LARGEST)
                if kind == "map":
                    found = self._open.load(start, end - start)
                else:
                    found = self._open.pread(kind, start, end - start)
                wrong += self._differs(start, end - start, found, f"{kind} read")
        return wrong

    def do_settle(self, size: int) -> list[str]:
        """After a crash, on a new mount."""
        wrong = []
        if self._number == 0:
            if not min(self._sizes) <= size <= rounded(max(self._sizes)):
                wrong.append(f"the size is {size}, not one of {sorted(self._sizes)}")
            self._size = size
        for start, end in self._part.all(size):
            found = self._open.pread("plain", start, end - start)
            self._sectors += len(found) // SECTOR
            wrong += self._shadow.settle(start, found)
        if self._number == 0:
            self._shadow.model[size : self._capacity] = bytes(self._capacity - size)
        self._all_durable()
        return wrong

    def do_closed(self, size: int) -> None:
        """The file was unmounted in good order: all is durable, and `size` is the size now."""
        self._size = size
        self._all_durable()

    def do_story(self, sectors: list[int]) -> list[str]:
        return [f"sector {sector}:\n{self._shadow.story(sector)}" for sector in sectors]


def main() -> None:
    model, *numbers = sys.argv[1:]
    worker = Worker(model, *map(int, numbers))
    for line in sys.stdin:
        os.write(1, json.dumps(worker.obey(json.loads(line))).encode() + b"\n")


if __name__ == "__main__":
    main()
