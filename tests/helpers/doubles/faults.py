"""A storage that fails once: its n-th call, with a given errno, before it does anything, half-way or when done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from qedfuse.host.storage import Buffer
from tests.helpers.doubles.crash import CrashStorage
from tests.helpers.doubles.ram import Chaos, RamFile
from tests.helpers.judges.history import Clock


@dataclass
class Fault:
    """`call` counts all calls that may fail, from 0. `when`: before, half (of a write) or after the deed.

    `hit` is what the call was, once it has failed. `zeroes`: it was to write nothing else.
    """

    call: int
    errno: int
    when: str = "before"
    hit: str = ""
    zeroes: bool = False

    def error(self) -> OSError:
        return OSError(self.errno, os.strerror(self.errno))


class FaultStorage(CrashStorage):
    """Fails as told, and keeps the crash log, so that what a failed call has left can be judged for the worst."""

    def __init__(
        self,
        path: str,
        file: RamFile,
        clock: Clock,
        fault: Fault | None,
        *,
        writable: bool = True,
        chaos: Chaos | None = None,
    ) -> None:
        super().__init__(path, file, clock, writable=writable, chaos=chaos)
        self.fault = fault
        self.calls: list[str] = []

    def _now(self, kind: str) -> Fault | None:
        """The fault if this call is the one."""
        self.calls.append(kind)
        fault = self.fault
        if fault is None or len(self.calls) - 1 != fault.call:
            return None
        fault.hit = kind
        return fault

    def read_into_nowait(self, offset: int, target: memoryview) -> bool:
        if fault := self._now("read"):
            target[: len(target) // 2] = b"\xee" * (len(target) // 2)
            raise fault.error()
        return super().read_into_nowait(offset, target)

    async def read_into(self, offset: int, target: memoryview) -> None:
        if fault := self._now("read"):
            target[: len(target) // 2] = b"\xee" * (len(target) // 2)
            raise fault.error()
        await super().read_into(offset, target)

    def next_data(self, offset: int) -> int | None:
        if fault := self._now("seek"):
            raise fault.error()
        return super().next_data(offset)

    def next_hole(self, offset: int) -> int:
        if fault := self._now("seek"):
            raise fault.error()
        return super().next_hole(offset)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if fault := self._now("write"):
            self._partly(fault, offset, bytes(data))
            raise fault.error()
        return super().write_nowait(offset, data)

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if fault := self._now("write" if offset else "header"):
            self._partly(fault, offset, b"".join(buffers))
            raise fault.error()
        await super().write(offset, buffers)

    def _partly(self, fault: Fault, offset: int, data: bytes) -> None:
        fault.zeroes = not any(data)
        if fault.when == "half":
            data = data[: len(data) // 2 // 512 * 512]  # a header is less than a sector: not torn
        if fault.when != "before" and data:
            self.apply_write(offset, data)

    async def sync(self) -> None:
        fault = self._now("sync")
        if fault is None or fault.when == "after":
            await super().sync()
        if fault:
            raise fault.error()

    async def truncate(self, size: int) -> None:
        fault = self._now("truncate")
        if fault is None or fault.when == "after":
            await super().truncate(size)
        if fault:
            raise fault.error()

    async def punch(self, offset: int, size: int) -> None:
        fault = self._now("punch")
        if fault is None or fault.when == "after":
            await super().punch(offset, size)
        elif fault.when == "half":
            await super().punch(offset, size // 2)
        if fault:
            raise fault.error()
