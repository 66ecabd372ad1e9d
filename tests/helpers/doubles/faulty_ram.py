"""A file in RAM, for check and repair, one of whose calls fails; and what is then on the disk for sure, or may be."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.helpers.doubles.faults import Fault
from tests.helpers.images.check_images import Ram, replay, torn


class FaultyRam(Ram):
    """Call number `fault.call` fails as told: before it does anything, half-way (a write, a punch), or when done."""

    def __init__(self, raw: bytes | bytearray, fault: Fault | None = None) -> None:
        super().__init__(raw)
        self.fault = fault
        self.calls: list[str] = []

    def _now(self, kind: str) -> Fault | None:
        """The fault if this call is the one."""
        self.calls.append(kind)
        if self.fault is None or len(self.calls) - 1 != self.fault.call:
            return None
        self.fault.hit = kind
        return self.fault

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

    def _do(self, kind: str, number: int = 0, data: bytes = b"") -> None:
        fault = self._now(kind)
        if fault and fault.when == "half" and len(data) >= 1024:
            data = data[: len(data) // 2 // 512 * 512]
        if fault is None or fault.when == "after" or (fault.when == "half" and data):
            super()._do(kind, number, data)
        if fault:
            raise fault.error()

    def crashes_now(self, rng: random.Random, samples: int) -> Iterator[bytes]:
        """What a crash at this moment could leave: nothing of what was not synced, all of it, or a part."""
        durable, pending = bytearray(self.start), list[tuple[str, int, bytes]]()
        for item in self.log:
            if item[0] == "sync":
                durable, pending = bytearray(replay(durable, pending)), []
            else:
                pending += torn(item)
        yield bytes(durable)
        yield replay(durable, pending)
        for _ in range(samples if pending else 0):
            yield replay(durable, [piece for piece in pending if rng.random() < 0.5])
