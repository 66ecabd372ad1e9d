"""The bytes of an image as a file in RAM, for check and repair: what is done to it, and what a crash could leave."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

from tests.helpers.doubles.crash import CrashPoint
from tests.helpers.doubles.faults import Fault, FaultStorage
from tests.helpers.doubles.ram import Chaos, RamFile
from tests.helpers.judges.history import Clock


class Ram(FaultStorage):
    """`unreadable`: reads that begin there fail."""

    def __init__(
        self,
        raw: bytes | bytearray,
        fault: Fault | None = None,
        *,
        writable: bool = True,
        chaos: Chaos | None = None,
    ) -> None:
        super().__init__("ram.qed", RamFile.of(raw), Clock(), fault, writable=writable, chaos=chaos)
        self.unreadable = range(0)

    @property
    def raw(self) -> bytes:
        return content(self.file)

    def read_into_nowait(self, offset: int, target: memoryview) -> bool:
        if offset in self.unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read_into_nowait(offset, target)

    def crashes(self, rng: random.Random, samples: int) -> Iterator[bytes]:
        """What a crash could leave: before and after each operation, what was synced and a part of the rest, which is
        nothing, everything, and `samples` random choices."""
        for point in self.crash_points():
            yield from states_of(point, rng, samples)

    def crashes_now(self, rng: random.Random, samples: int) -> Iterator[bytes]:
        """What a crash at this moment could leave."""
        yield from states_of(self.crash_point_now(), rng, samples)


def content(file: RamFile) -> bytes:
    return file.read(0, file.size)


def states_of(point: CrashPoint, rng: random.Random, samples: int) -> Iterator[bytes]:
    """What a crash at `point` could leave; see `Ram.crashes`."""
    yield content(point.least())
    if point.pending:
        yield content(point.most())
        for _ in range(samples):
            yield content(point.some_state(rng))
