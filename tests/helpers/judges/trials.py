"""A scenario with one storage call that fails, and the judge of what comes of it."""

from __future__ import annotations

import errno
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field

from qedfuse.qed.geometry import Geometry
from qedfuse.qed.table_pages import PagePool
from qedfuse.sizes import TableIndex
from tests.helpers.doubles.faults import Fault, FaultStorage
from tests.helpers.doubles.ram import Chaos
from tests.helpers.images.images import (
    TINY,
    Chain,
    assert_leaks_are_holes,
    assert_sound,
    contents,
    open_chain,
    read_header,
)
from tests.helpers.judges.history import SECTOR, Guest, History
from tests.helpers.judges.survival import Run, Scenario

#: One page: nearly every look-up reads a table.
POOL = PagePool(capacity=1)
#: Errno, and before, half-way or after the deed.
FAULTS = [(errno.EIO, "before"), (errno.ENOSPC, "half"), (errno.EIO, "after"), (errno.ENOSPC, "before")]


@dataclass
class StubbornGuest(Guest):
    """Goes on when something fails, and puts it on record. Reads back what it has written.

    `lies`: what succeeded and must not. `may_leak`: something was being given back when it failed.
    """

    may_fail: bool = True
    errors: list[OSError] = field(default_factory=list)
    lies: list[str] = field(default_factory=list)
    close_failed: bool = False
    may_leak: bool = False

    def __post_init__(self) -> None:
        drop = self.image.clusters.drop_table

        async def drop_table(index: TableIndex) -> None:
            try:
                await drop(index)
            except OSError:
                self.may_leak = True
                raise

        self.image.clusters.drop_table = drop_table  # type: ignore[method-assign,assignment]

    async def attempt(self, what: Coroutine[object, object, None], *, flushing: bool = False) -> bool:
        """Whether it has succeeded."""
        failed = self.image.failed
        try:
            await what
        except OSError as error:
            self.errors.append(error)
            return False
        if failed and flushing:
            self.lies.append("a flush or close succeeded after a failed sync")
        return True

    async def write(self, offset: int, size: int, *, data: bytes | None = None) -> None:
        await self.attempt(super().write(offset, size, data=data))
        start = offset - offset % SECTOR
        await self.read(start, offset + size - start)

    async def zero(self, offset: int, size: int) -> None:
        await self.attempt(super().zero(offset, size))

    async def discard(self, offset: int, size: int) -> None:
        await self.attempt(super().discard(offset, size))

    async def resize(self, size: int) -> None:
        if not await self.attempt(super().resize(size)):
            self.may_leak = True

    async def flush(self) -> None:
        await self.attempt(super().flush(), flushing=True)

    async def write_back(self) -> None:
        await self.attempt(super().write_back())

    async def clean(self) -> None:
        await self.attempt(super().clean(), flushing=True)

    async def read(self, offset: int, size: int) -> None:
        await self.attempt(super().read(offset, size))

    async def close(self) -> None:
        """The first time only: another one promises nothing."""
        if not self.image._closed:
            self.close_failed = not await self.attempt(super().close(), flushing=True)

    def expect(self, data: bytes, *, lost: bool) -> None:
        """`data` is what is seen of the image now. `lost`: what was not flushed may be missing."""
        now = self.history.tick()
        rest = bytearray(data)
        for number in self.history.ever_data(0, -(-len(data) // SECTOR)):
            found = data[number * SECTOR : (number + 1) * SECTOR]
            register = self.history.sector(number)
            possible = register.after_crash(now) if lost else register.visible(now, now)
            assert found in possible, f"sector {number}: {found[:16]!r}"
            rest[number * SECTOR : (number + 1) * SECTOR] = bytes(len(found))
        assert rest.count(0) == len(rest), "nobody has ever written that"


@dataclass
class Trial:
    """One run over `chain`, whose image reads as `flat` at first. `fault`: None to see which calls there are."""

    chain: Chain
    flat: bytes
    fault: Fault | None
    geometry: Geometry = TINY
    chaos: Chaos = field(default_factory=lambda: Chaos(1, refuse=0.5, yields=0, split=0))
    errors: list[OSError] = field(default_factory=list)
    guest: StubbornGuest | None = None

    def __post_init__(self) -> None:
        self.history = History(self.flat)
        self.storage = FaultStorage("image", self.chain.file, self.history, self.fault, chaos=self.chaos)

    async def open(self) -> StubbornGuest | None:
        """None: the fault has hit already."""
        try:
            image = await open_chain(self.chain, self.storage, pool=POOL)
        except OSError as error:
            self.errors.append(error)
            await self.storage.close()
            return None
        self.guest = StubbornGuest(image, self.history, self.geometry.cluster_size, errors=self.errors)
        return self.guest

    async def run(self, scenario: Scenario) -> None:
        guest = await self.open()
        if guest:
            await scenario(guest)
            await guest.close()
        assert self.storage.closed

    async def judge(self, rnd: random.Random, *, shared: bool = False, quiet: bool = False) -> None:
        """`shared`: several tasks may have waited for the call that failed. `quiet`: there may have been none, and what
        has failed has been tried again."""
        fault, storage = self.fault, self.storage
        assert fault and fault.hit
        assert not (self.guest and self.guest.lies), self.guest.lies
        sync_failed = fault.hit == "sync"
        unopened = self.guest is None  # a check says EIO of what it cannot read
        expected = {fault.errno} | ({errno.EIO} if sync_failed or unopened else set())
        assert all(error.errno in expected for error in self.errors), self.errors
        # Zeroes that found no space: a hole does as well.
        following = storage.calls[fault.call + 1 :][:1]
        made_good = fault.zeroes and fault.errno == errno.ENOSPC and following == ["punch"]
        if fault.hit != "punch" and (sync_failed or not quiet) and not made_good:
            assert self.errors, "nobody was told"
        if not sync_failed:
            assert shared or len(self.errors) <= 1, f"one fault, but these failed: {self.errors}"
        else:
            assert "sync" not in storage.calls[fault.call + 1 :], "a second sync cannot make good for a failed one"
        if self.guest and not sync_failed:
            await self._judge_the_rest(fault)
        # The worst that can come now, or could have come at any time before.
        run = Run(self.chain, self.history, storage, self.geometry)
        run.watch()
        if fault.hit == "header" and fault.when == "after":  # what the file says is not what memory says
            await run.enumerate(rnd, complete=64, samples=100)
            return
        points = list(storage.crash_points())
        for point in [points[-1]] * 3 + rnd.choices(points, k=2):
            await run.survive(point.some_state(rnd), point, thorough=rnd.random() < 0.2)

    async def _judge_the_rest(self, fault: Fault) -> None:
        """Everything went on, but for what was told."""
        assert self.guest
        assert not self.guest.image.failed
        assert not read_header(self.storage.file).needs_check or self.errors
        # A cluster for a write that failed is a hole, if others came behind it. A leak is what could not be punched,
        # what a table maps that went and could not be read, what is left past the end of an image that was to be
        # smaller, and what a close that failed did not get to.
        guest = self.guest
        leaks = fault.hit == "punch" or guest.may_leak or guest.close_failed
        await (assert_sound(self.storage.file, leaks=True) if leaks else assert_leaks_are_holes(self.storage.file))
        data = await contents(self.chain)
        assert len(data) == guest.image.size
        guest.expect(data, lost=guest.close_failed)
