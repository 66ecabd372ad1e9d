"""The gate in front of an image: what waits for what when the image is replaced."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import trio
import trio.testing

from qedfuse.fuse.image_slot import ImageSlot
from qedfuse.qed.image import Image


class Fake:
    """What a slot asks of an image. `error`: what cleaning it raises."""

    def __init__(self, size: int = 512, *, writable: bool = True) -> None:
        self.path = "fake.qed"
        self.size = size
        self.writable = writable
        self.error: OSError | None = None
        self.cleaned = 0

    async def clean(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        self.cleaned += 1


class Watching:
    def __init__(self) -> None:
        self.seen: list[object] = []

    def hide(self) -> None:
        self.seen.append(None)

    def show(self, image: Image) -> None:
        self.seen.append(image)


def run(body: Callable[[ImageSlot, Any], Awaitable[None]]) -> None:
    async def main() -> None:
        slot, image = ImageSlot(), Fake()
        slot.put(cast(Image, image))
        with trio.fail_after(10):
            await body(slot, image)

    trio.run(main)


def new(size: int = 512, *, writable: bool = True) -> Any:
    return Fake(size, writable=writable)


def test_those_under_way_end_first_and_those_that_arrive_get_the_other_image() -> None:
    async def body(slot: ImageSlot, old: Any) -> None:
        log: list[object] = []
        go_on = trio.Event()
        other = new()

        async def request(name: str) -> None:
            async with slot as image:
                log.append((name, image))
                await go_on.wait()
                log.append(name)

        async def replace() -> None:
            async with slot.quiesced() as image:
                log.append(("alone", image))
                assert old.cleaned == 1
                await trio.testing.wait_all_tasks_blocked()
                slot.replace(other)
                assert slot.ready is None
                assert slot.image is other

        async with trio.open_nursery() as nursery:
            nursery.start_soon(request, "first")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(replace)
            await trio.testing.wait_all_tasks_blocked()
            assert slot.ready is None
            nursery.start_soon(request, "second")
            await trio.testing.wait_all_tasks_blocked()
            assert log == [("first", old)]
            go_on.set()
        assert log == [("first", old), "first", ("alone", old), ("second", other), "second"]
        assert slot.ready is other

    run(body)


def test_what_holds_the_slot_without_a_block_is_waited_for() -> None:
    async def body(slot: ImageSlot, old: Any) -> None:
        slot.hold()
        quiesced = trio.Event()

        async def quiesce() -> None:
            async with slot.quiesced():
                quiesced.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(quiesce)
            await trio.testing.wait_all_tasks_blocked()
            assert not quiesced.is_set()
            slot.release()

    run(body)


def test_observers_let_go_before_others_are_waited_for() -> None:
    """The fast path must not begin anything while those under way come to their end."""

    async def body(slot: ImageSlot, old: Any) -> None:
        watching = Watching()
        slot.observers.append(watching)
        slot.hold()
        other = new()

        async def replace() -> None:
            async with slot.quiesced():
                slot.replace(other)
                assert watching.seen == [None]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(replace)
            await trio.testing.wait_all_tasks_blocked()
            assert watching.seen == [None]
            slot.release()
        assert watching.seen == [None, other]

    run(body)


def test_an_image_that_cannot_be_cleaned_stays() -> None:
    """Its error is not lost with it."""

    async def body(slot: ImageSlot, old: Any) -> None:
        watching = Watching()
        slot.observers.append(watching)
        old.error = OSError(errno.EIO, "an earlier sync failed")
        with pytest.raises(OSError, match="an earlier sync failed"):
            async with slot.quiesced():
                raise AssertionError
        assert slot.ready is old
        assert watching.seen == [None, old]
        async with slot as image:
            assert image is old

    run(body)


def test_cancelled_while_it_waits_it_lets_all_go_on() -> None:
    async def body(slot: ImageSlot, old: Any) -> None:
        slot.hold()
        with trio.move_on_after(0.01):
            async with slot.quiesced():
                raise AssertionError
        assert slot.ready is old
        async with slot:
            pass
        slot.release()
        async with slot.quiesced():
            pass

    run(body)


def test_an_error_in_the_block_lets_all_go_on() -> None:
    async def body(slot: ImageSlot, old: Any) -> None:
        with pytest.raises(ZeroDivisionError):
            async with slot.quiesced():
                raise ZeroDivisionError
        assert slot.ready is old

    run(body)


def test_one_replacement_at_a_time() -> None:
    async def body(slot: ImageSlot, old: Any) -> None:
        inside = 0

        async def replace() -> None:
            nonlocal inside
            async with slot.quiesced():
                inside += 1
                await trio.testing.wait_all_tasks_blocked(0.001)
                assert inside == 1
                slot.replace(new())
                inside -= 1

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(replace)
        assert slot.ready is not None

    run(body)


@pytest.mark.parametrize("other", [new(1024), new(writable=False)], ids=["another size", "not writable"])
def test_what_is_not_alike_is_refused(other: Any) -> None:
    async def body(slot: ImageSlot, old: Any) -> None:
        with pytest.raises(ValueError, match="cannot take the place"):
            async with slot.quiesced():
                slot.replace(other)
        assert slot.ready is old

    run(body)


def test_an_empty_slot_is_an_error_and_no_wait() -> None:
    async def body(slot: ImageSlot, old: Any) -> None:
        assert slot.take() is old
        with pytest.raises(OSError, match="Bad file descriptor"):
            async with slot:
                raise AssertionError
        with pytest.raises(OSError, match="Bad file descriptor"):
            async with slot.quiesced():
                raise AssertionError

    run(body)
