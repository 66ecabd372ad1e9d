"""Another backing file under an open image: what changes with it, what QEMU says, what is refused, what may fail.

That no crash shows anything else is in tests/system/crash/test_crash_backing.py.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import ParamSpec

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.chain.chain import open_layer
from qedfuse.chain.opening import open_image
from qedfuse.errors import QedfuseError, ReadOnlyError
from qedfuse.layers.raw import RawLayer
from qedfuse.layers.runs import Kind
from qedfuse.qed.image import Image
from qedfuse.qed.native_view import NativeView
from qedfuse.tools.create import create_image
from tests.helpers.doubles.faults import Fault, FaultStorage
from tests.helpers.doubles.ram import RamStorage
from tests.helpers.images.images import Chain, backing_name, new_chain, open_chain, raw_file, read_header
from tests.helpers.judges.history import History
from tests.helpers.qemu.cli import qemu_img

P = ParamSpec("P")

CLUSTER = 4096
SIZE = 16 * CLUSTER


def in_trio(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    @wraps(test)
    def run(*arguments: P.args, **keywords: P.kwargs) -> None:
        trio.run(partial(test, *arguments, **keywords))

    return run


def layer(byte: bytes, size: int = SIZE) -> RawLayer:
    return RawLayer.open(RamStorage(byte.decode(), raw_file(byte * size), writable=False))


async def over_a() -> Chain:
    return await new_chain(SIZE, below=[(raw_file(b"a" * SIZE), "raw")])


@in_trio
async def test_reads_and_copies_come_from_the_new_layer() -> None:
    """(The contents differ, which nobody may do: so one sees where they come from.)"""
    image = await open_chain(await over_a())
    old, new = image.backing, layer(b"b")
    await image.write(0, b"x")
    assert await image.set_backing(new, "b") is old
    assert image.backing is new
    await image.write(CLUSTER, b"x")
    assert await image.read(0, 2) == b"xa"
    assert await image.read(CLUSTER, 2) == b"xb"
    assert await image.read(5 * CLUSTER, 2) == b"bb"
    assert await image.set_backing(None) is new
    await image.write(2 * CLUSTER, b"x")
    assert await image.read(2 * CLUSTER, 2) == b"x\0"
    assert await image.read(5 * CLUSTER, 2) == b"\0\0"
    await image.close()


@in_trio
async def test_zero_entries_and_the_mark_follow() -> None:
    chain = await new_chain(SIZE)
    image = await open_chain(chain)
    await image.write(0, b"x")
    await image.zero(2 * CLUSTER, CLUSTER)
    await image.flush()
    assert read_header(chain.file).needs_check
    await image.set_backing(layer(b"\0"), "zeroes")
    assert backing_name(chain.file) == "zeroes"
    assert read_header(chain.file) == image.header
    assert image.header.backing_is_raw and not image.header.needs_check
    await image.zero(3 * CLUSTER, CLUSTER)
    await image.write(4 * CLUSTER, b"x")
    await image.flush()
    assert not read_header(chain.file).needs_check
    assert [run.kind for run in await image.map(2 * CLUSTER, 2 * CLUSTER)] == [Kind.UNALLOCATED, Kind.ZERO]
    await image.set_backing(None)
    await image.zero(5 * CLUSTER, CLUSTER)
    assert [run.kind for run in await image.map(5 * CLUSTER, CLUSTER)] == [Kind.UNALLOCATED]
    assert not read_header(chain.file).needs_check
    await image.write(6 * CLUSTER, b"x")
    await image.flush()
    assert read_header(chain.file).needs_check
    await image.close()
    assert not read_header(chain.file).needs_check
    assert not read_header(chain.file).has_backing_file


@in_trio
async def test_the_version_changes() -> None:
    """What a search has found of holes is not true any more."""
    image = await open_chain(await over_a())
    before = image.version
    await image.set_backing(layer(b"b"), "b")
    assert image.version != before
    await image.close()


@in_trio
async def test_the_image_closes_what_it_has_below_it() -> None:
    image = await open_chain(await over_a())
    new = layer(b"b")
    old = await image.set_backing(new, "b")
    await image.close()
    assert isinstance(new.storage, RamStorage) and new.storage.closed
    assert isinstance(old, RawLayer) and isinstance(old.storage, RamStorage) and not old.storage.closed


@in_trio
async def test_a_read_through_the_old_layer_comes_to_its_end_first() -> None:
    class SlowStorage(RamStorage):
        gate = trio.Event()

        def read_into_nowait(self, offset: int, target: memoryview) -> bool:
            return False

        async def read_into(self, offset: int, target: memoryview) -> None:
            await self.gate.wait()
            await super().read_into(offset, target)

    image = await open_chain(await new_chain(SIZE))
    slow = RawLayer.open(SlowStorage("slow", raw_file(b"a" * SIZE), writable=False))
    await image.set_backing(slow, "slow")
    found = []

    async def read() -> None:
        found.append(await image.read(CLUSTER, 2))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        nursery.start_soon(image.set_backing, layer(b"b"), "b")
        await wait_all_tasks_blocked()
        assert image.backing is slow
        SlowStorage.gate.set()
    assert found == [b"aa"]
    assert image.backing is not slow
    await image.close()


@in_trio
async def test_what_reads_past_the_image_is_told() -> None:
    """A view of before is of no use any more: C knows another layer below."""
    image = await open_chain(await over_a())
    view = NativeView(image)
    view.refresh()
    await image.set_backing(layer(b"b"), "b")
    with pytest.raises(AssertionError, match="was replaced"):
        view.refresh()
    NativeView(image).refresh()
    await image.close()


# -- refused ----------------------------------------------------------------------------------------------------------


@in_trio
async def test_refused_before_anything() -> None:
    chain = await over_a()
    storage = FaultStorage("image", chain.file, History(b""), None)
    image = await open_chain(chain, storage)
    await image.write(0, b"x")
    old, header, done = image.backing, image.header, len(storage.calls)
    with pytest.raises(QedfuseError, match="has 4096 bytes; the header has room for") as caught:
        await image.set_backing(layer(b"b"), "n" * 4096)
    assert caught.value.errno == errno.ENAMETOOLONG
    for below, name in ((None, "name"), (layer(b"b"), ""), (layer(b"b"), "a\0b")):
        with pytest.raises(ValueError, match="belong together"):
            await image.set_backing(below, name)
    assert len(storage.calls) == done
    assert (image.backing, image.header) == (old, header)
    await image.close()


@in_trio
async def test_read_only_is_refused() -> None:
    chain = await over_a()
    image = Image(
        RamStorage("image", chain.file, writable=False), read_header(chain.file), chain.layer_below(), writable=False
    )
    with pytest.raises(ReadOnlyError):
        await image.set_backing(layer(b"b"), "b")
    await image.close()


@in_trio
async def test_names_have_their_places() -> None:
    """One after another, as long as there is room beside the one that is there."""
    chain = await over_a()
    image = await open_chain(chain)
    for size in (1, 1000, 448, 2000, 1000, 5, 3000, 6, 10):
        name = chr(97 + size % 26) * size
        await image.set_backing(layer(b"b"), name)
        assert backing_name(chain.file) == name
    await image.set_backing(layer(b"b"), "x" * 2100)
    with pytest.raises(QedfuseError, match="room for") as caught:
        await image.set_backing(layer(b"b"), "y" * 2100)
    assert caught.value.errno == errno.ENAMETOOLONG
    assert backing_name(chain.file) == "x" * 2100
    await image.close()


# -- failing ----------------------------------------------------------------------------------------------------------


async def attempt(fault: Fault | None) -> tuple[FaultStorage, Image, BaseException | None]:
    """Replace the backing file while something is dirty; call number `fault.call` of that fails."""
    chain = await over_a()
    storage = FaultStorage("image", chain.file, History(b""), None)
    image = await open_chain(chain, storage)
    await image.write(0, b"x")
    storage.calls.clear()
    storage.fault = fault
    try:
        await image.set_backing(layer(b"a"), "new")
    except OSError as error:
        return storage, image, error
    finally:
        storage.fault = None
    return storage, image, None


@pytest.mark.parametrize("when", ["before", "after"])
@in_trio
async def test_each_call_fails_once(when: str) -> None:
    storage, image, error = await attempt(None)
    assert error is None
    calls = list(storage.calls)
    assert {"write", "sync", "header"} <= set(calls)
    await image.close()
    for number, kind in enumerate(calls):
        fault = Fault(number, errno.EIO if kind == "sync" else errno.ENOSPC, when)
        storage, image, error = await attempt(fault)
        assert isinstance(error, OSError) and error.errno == fault.errno
        assert isinstance(image.backing, RawLayer) and image.backing.path == "below0"
        assert bool(image.failed) is (kind == "sync")
        if kind == "sync":
            with suppress(OSError):
                await image.close()
            continue
        await image.write(CLUSTER, b"y")
        await image.flush()  # writes the old header again, before all else
        assert backing_name(storage.file) == "below0"
        assert await image.set_backing(layer(b"a"), "new") is not None
        assert backing_name(storage.file) == "new"
        assert await image.read(0, 2) == b"xa"
        await image.close()


@pytest.mark.parametrize("steps", range(4))
@in_trio
async def test_cancelled_it_has_happened_or_not(steps: int) -> None:
    chain = await over_a()
    image = await open_chain(chain)
    await image.write(0, b"x")
    new = layer(b"a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.set_backing, new, "new")
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert backing_name(chain.file) == ("new" if image.backing is new else "below0")
    await image.close()


# -- QEMU -------------------------------------------------------------------------------------------------------------


def backing_in(path: Path) -> str | None:
    name = json.loads(qemu_img("info", "--output=json", path)).get("backing-filename")
    assert name is None or isinstance(name, str)
    return name


@pytest.mark.parametrize("format", ["raw", "qed", "qcow2"])
@in_trio
async def test_qemu_agrees(tmp_path: Path, format: str) -> None:
    content = os.urandom(SIZE)
    flat = tmp_path / "flat"
    flat.write_bytes(content)
    other = tmp_path / ("other" * 40)
    qemu_img("convert", "-f", "raw", "-O", format, flat, other)
    path = tmp_path / "image.qed"
    await create_image(os.fspath(path), SIZE * 2, backing="flat", backing_format="raw")

    expected = bytearray(content.ljust(2 * SIZE, b"\0"))
    compared = tmp_path / "expected"

    def judge(name: str | None) -> None:
        compared.write_bytes(expected)
        assert backing_in(path) == name
        qemu_img("check", path)
        qemu_img("compare", "-f", "qed", "-F", "raw", path, compared)

    async with open_image(path) as image:
        await image.write(700, b"mine")
        expected[700:704] = b"mine"
        old = await image.set_backing(await open_layer(other, format, share=True), other.name)
        assert old
        await old.close()
    judge(other.name)
    async with open_image(path) as image:
        assert image.backing and image.backing.format == format
        assert await image.read(0, 2 * SIZE) == expected
        for offset in range(0, SIZE, 512):  # all of it
            await image.write(offset, await image.read(offset, 512))
        await image.write(SIZE, b"more")
        expected[SIZE : SIZE + 4] = b"more"
        old = await image.set_backing(None)
        assert old
        await old.close()
    judge(None)
    async with open_image(path) as image:
        assert image.backing is None
        assert await image.read(0, 2 * SIZE) == expected
        await image.set_backing(await open_layer(flat, "raw", share=True), os.fspath(flat))
        await image.write(SIZE + 512, b"end")
        expected[SIZE + 512 : SIZE + 515] = b"end"
    judge(os.fspath(flat))
