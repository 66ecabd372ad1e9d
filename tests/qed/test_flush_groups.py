"""Flushes that come while a commit runs share the next one: what they share, in which order, and which is cancelled."""

from __future__ import annotations

import errno
import os

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.qed.image import Image
from tests.helpers.doubles.ram import RamStorage
from tests.helpers.images.images import assert_sound, new_chain, open_chain

CLUSTER = 4096


class GatedStorage(RamStorage):
    """Its syncs wait for `gate`; those that end are counted. `fails`: its next write of a page does."""

    gate: trio.Event
    fails = False

    async def sync(self) -> None:
        await self.gate.wait()
        await super().sync()

    async def write(self, offset: int, buffers: object) -> None:
        if self.fails:
            self.fails = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        await super().write(offset, buffers)  # type: ignore[arg-type]


class Flushes:
    """Callers of `image.flush` by name, in the order in which they have come back."""

    def __init__(self, image: Image, nursery: trio.Nursery) -> None:
        self.ended: list[tuple[str, int]] = []
        self._image = image
        self._nursery = nursery

    async def begin(self, name: str) -> trio.CancelScope:
        """One that has written something of its own before."""
        await self._image.write(len(name) * CLUSTER, name.encode())
        scope = trio.CancelScope()
        self._nursery.start_soon(self._flush, name, scope)
        await wait_all_tasks_blocked()
        return scope

    async def _flush(self, name: str, scope: trio.CancelScope) -> None:
        code = 0
        with scope:
            try:
                await self._image.flush()
            except OSError as error:
                code = error.errno or 0
        self.ended.append((name, -1 if scope.cancelled_caught else code))


async def opened() -> tuple[GatedStorage, Image]:
    """Over a backing file or not there are no differences here; all tables are there, and the mark is set."""
    chain = await new_chain(64 * CLUSTER)
    storage = GatedStorage("image", chain.file)
    storage.gate = trio.Event()
    storage.gate.set()
    image = await open_chain(chain, storage)
    await image.write(0, b"first")
    await image.flush()
    storage.gate = trio.Event()
    storage.syncs = 0
    return storage, image


async def finish(storage: GatedStorage, image: Image) -> None:
    await image.close()
    await assert_sound(storage.file)


def test_those_that_wait_share_one_commit() -> None:
    async def main() -> None:
        storage, image = await opened()
        async with trio.open_nursery() as nursery:
            flushes = Flushes(image, nursery)
            for name in ("running", "a", "bb", "ccc"):
                await flushes.begin(name)
            storage.gate.set()
        assert flushes.ended == [("running", 0), ("a", 0), ("bb", 0), ("ccc", 0)]
        assert storage.syncs == 2
        assert image.stats().dirty_pages == 0
        await finish(storage, image)

    trio.run(main)


@pytest.mark.parametrize("cancelled", [0, 1, 2])
def test_one_of_those_that_wait_is_cancelled(cancelled: int) -> None:
    """It leaves at once; the commit of the others is made, whichever it was."""

    async def main() -> None:
        storage, image = await opened()
        names = ["a", "bb", "ccc"]
        async with trio.open_nursery() as nursery:
            flushes = Flushes(image, nursery)
            await flushes.begin("running")
            scopes = [await flushes.begin(name) for name in names]
            scopes[cancelled].cancel()
            await wait_all_tasks_blocked()
            gone = names.pop(cancelled)
            assert flushes.ended == [(gone, -1)]
            storage.gate.set()
        assert flushes.ended == [(gone, -1), ("running", 0), *((name, 0) for name in names)]
        assert storage.syncs == 2
        assert image.stats().dirty_pages == 0  # with what the cancelled one has written
        await finish(storage, image)

    trio.run(main)


def test_all_that_wait_are_cancelled() -> None:
    """Then there is no commit for them, and the next caller has its own."""

    async def main() -> None:
        storage, image = await opened()
        async with trio.open_nursery() as nursery:
            flushes = Flushes(image, nursery)
            await flushes.begin("running")
            for scope in [await flushes.begin(name) for name in ("a", "bb")]:
                scope.cancel()
            storage.gate.set()
            await wait_all_tasks_blocked()
            assert storage.syncs == 1
            await flushes.begin("ccc")
        assert flushes.ended[-1] == ("ccc", 0)
        assert storage.syncs == 2
        await finish(storage, image)

    trio.run(main)


def test_a_commit_that_has_begun_is_carried_out() -> None:
    async def main() -> None:
        storage, image = await opened()
        async with trio.open_nursery() as nursery:
            flushes = Flushes(image, nursery)
            scope = await flushes.begin("running")
            await flushes.begin("a")
            scope.cancel()
            await wait_all_tasks_blocked()
            assert flushes.ended == []
            storage.gate.set()
        assert [name for name, _code in flushes.ended] == ["running", "a"]
        assert storage.syncs == 2
        await finish(storage, image)

    trio.run(main)


def test_an_error_is_told_to_all_that_share_it() -> None:
    async def main() -> None:
        storage, image = await opened()
        async with trio.open_nursery() as nursery:
            flushes = Flushes(image, nursery)
            await flushes.begin("running")
            await flushes.begin("a")
            await flushes.begin("bb")
            storage.fails = True
            storage.gate.set()
        assert flushes.ended == [("running", 0), ("a", errno.ENOSPC), ("bb", errno.ENOSPC)]
        assert image.stats().dirty_pages
        await image.flush()
        assert not image.stats().dirty_pages
        await finish(storage, image)

    trio.run(main)
