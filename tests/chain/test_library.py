"""The library as a program uses it: every call a checkpoint, bad arguments refused with the image untouched, calls that
come too late or from elsewhere.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import os
import re
import signal
import subprocess
import sys
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

import qedfuse
from qedfuse.host import waiting as blocking
from tests.helpers.images.chains import SIZE, check_is_clean, make_qed, make_raw, run
from tests.helpers.judges.expect import raises_errno
from tests.helpers.qemu.cli import ROOT, environment, qemu_img

CLUSTER = 64 << 10
MIB = 1 << 20
DATA = bytes(range(256)) * 1024

Call = Callable[[qedfuse.Image], Awaitable[object]]

#: Each call, where it is done in a moment.
CALLS: dict[str, Call] = {
    "read": lambda image: image.read(0, 4096),
    "read nothing": lambda image: image.read(0, 0),
    "read unallocated": lambda image: image.read(2 * CLUSTER, 4096),
    "read past the end": lambda image: image.read(image.size, 512),
    "map": lambda image: image.map(0, 4096),
    "map past the end": lambda image: image.map(image.size, 512),
    "write": lambda image: image.write(0, b"in place"),
    "write nothing": lambda image: image.write(0, b""),
    "zero": lambda image: image.zero(0, 512),
    "zero nothing": lambda image: image.zero(0, 0),
    "discard": lambda image: image.discard(0, CLUSTER),
    "discard nothing": lambda image: image.discard(512, 512),
    "resize": lambda image: image.resize(image.size + 512 if image.size == SIZE else SIZE),
    "resize to the same": lambda image: image.resize(image.size),
    "flush": lambda image: image.flush(),
}
CHANGES = {name: call for name, call in CALLS.items() if not re.match("read|map|flush", name)}
#: All of them, for one that wants any.
EACH_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image whose first cluster has data."""
    image = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", image, SIZE)

    async def fill() -> None:
        async with qedfuse.open_image(image) as disk:
            await disk.write(0, DATA[:CLUSTER])

    run(fill)
    return image


def using(path: Path, function: Call, *, read_only: bool = False, fixed_size: bool = False) -> None:
    """Do something with an open image."""

    async def main() -> None:
        async with qedfuse.open_image(path, read_only=read_only, fixed_size=fixed_size) as image:
            await function(image)

    run(main)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@EACH_CALL
def test_every_call_is_a_checkpoint(path: Path, call: Call) -> None:
    async def main(image: qedfuse.Image) -> None:
        for _ in range(3):
            with trio.testing.assert_checkpoints():
                await call(image)

    using(path, main)


@EACH_CALL
def test_a_loop_of_calls_can_be_cancelled(path: Path, call: Call) -> None:
    async def main(image: qedfuse.Image) -> None:
        with trio.move_on_after(0.05) as scope:
            for _ in range(20_000):
                await call(image)
        assert scope.cancelled_caught

    using(path, main)


@EACH_CALL
def test_a_call_that_comes_cancelled_does_nothing(path: Path, call: Call) -> None:
    before = path.read_bytes()

    async def main(image: qedfuse.Image) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await call(image)
        assert scope.cancelled_caught
        assert image.size == SIZE

    using(path, main)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", CHANGES)
def test_a_small_change_is_cancelled_or_done(path: Path, name: str) -> None:
    """Never both, wherever it waits when it is cancelled."""
    call = CHANGES[name]
    outcomes = []

    async def main(image: qedfuse.Image) -> None:
        for steps in range(8):
            await image.resize(SIZE)
            await image.write(0, DATA[:CLUSTER])
            await image.flush()
            before = await image.read(0, SIZE)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def cancel(scope: trio.CancelScope = scope, steps: int = steps) -> None:
                        for _ in range(steps):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()

                    if steps == 0:
                        scope.cancel()
                    returned = False
                    await call(image)
                    returned = True
                    await trio.sleep_forever()
            if not returned:
                assert await image.read(0, 2 * SIZE) == before
            outcomes.append(returned)

    using(path, main)
    assert not outcomes[0] and outcomes[-1]


async def turns_during(call: Awaitable[object]) -> int:
    """How often another task has its turn."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await trio.lowlevel.checkpoint()
        turns = 0
        await call
        nursery.cancel_scope.cancel()
    return turns


LARGE = 64 * MIB
LARGE_CALLS: dict[str, Call] = {
    "write into new clusters": lambda image: image.write(0, b"x" * LARGE),
    "write in place": lambda image: image.write(100, b"y" * (LARGE - 200)),
    "read": lambda image: image.read(0, LARGE),
    "write zeroes": lambda image: image.write(0, bytes(LARGE)),
}


def test_a_large_call_lets_others_have_their_turn(tmp_path: Path) -> None:
    """Turns are counted and not timed: between two of them lies a step of a few MiB."""
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", path, LARGE)

    async def main(image: qedfuse.Image) -> None:
        for name, call in LARGE_CALLS.items():
            turns = await turns_during(call(image))
            print(f"figures: {name}: {turns} turns")
            assert turns >= 15, name

    using(path, main)


SMALL_CLUSTERS: dict[str, Call] = {
    "zero": lambda image: image.zero(0, LARGE),
    "discard": lambda image: image.discard(0, LARGE),
    "shrink": lambda image: image.resize(0),
}


@pytest.mark.parametrize("call", SMALL_CLUSTERS.values(), ids=SMALL_CLUSTERS)
def test_so_does_one_over_many_clusters(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every step took as long as a turn may take."""
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=4k,table_size=1", path, LARGE)
    monkeypatch.setattr(blocking, "_BREATH", 0)

    async def main(image: qedfuse.Image) -> None:
        await image.write(0, b"x" * LARGE)
        assert await turns_during(call(image)) >= LARGE // 4096 // 512

    using(path, main)


def test_a_long_write_stops_where_it_is_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", path, LARGE)

    async def main(image: qedfuse.Image) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def cancel() -> None:
                    while await image.read(0, 1) != b"x":
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                await image.write(0, b"x" * LARGE)
        assert scope.cancelled_caught
        data = await image.read(0, LARGE)
        written = data.count(b"x")
        assert 0 < written < LARGE
        assert data == b"x" * written + bytes(LARGE - written)

    using(path, main)
    check_is_clean(path)


# -- arguments --------------------------------------------------------------------------------------------------------


class Number:
    """As NumPy's integers are."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


#: Calls with a number in one place.
WITH_NUMBER: dict[str, Callable[[qedfuse.Image, int], Awaitable[object]]] = {
    "read offset": lambda image, number: image.read(number, 10),
    "read size": lambda image, number: image.read(0, number),
    "map offset": lambda image, number: image.map(number, 10),
    "map size": lambda image, number: image.map(0, number),
    "write offset": lambda image, number: image.write(number, b"0123456789"),
    "write nothing, offset": lambda image, number: image.write(number, b""),
    "zero offset": lambda image, number: image.zero(number, SIZE),
    "zero size": lambda image, number: image.zero(0, number),
    "discard offset": lambda image, number: image.discard(number, SIZE),
    "discard size": lambda image, number: image.discard(0, number),
    "resize": lambda image, number: image.resize(number),
}
BAD_NUMBERS: list[tuple[object, type[Exception]]] = [
    *((value, ValueError) for value in (-1, -512, -CLUSTER, -SIZE, -(1 << 63), -(10**30), Number(-1))),
    *((value, TypeError) for value in (1.5, 1.0, float("nan"), float("inf"), "512", b"512", None, [0], 1j)),
]


@pytest.mark.parametrize("name", WITH_NUMBER)
def test_numbers_that_cannot_be(path: Path, name: str) -> None:
    call = WITH_NUMBER[name]

    async def main(image: qedfuse.Image) -> None:
        for value, error in BAD_NUMBERS:
            with trio.fail_after(10), pytest.raises(error):
                await call(image, value)  # type: ignore[arg-type]
            assert image.size == SIZE
        assert await image.read(0, SIZE) == DATA[:CLUSTER] + bytes(SIZE - CLUSTER)

    before = path.read_bytes()
    using(path, main)
    assert path.read_bytes() == before


def test_any_integer_will_do(path: Path) -> None:
    async def main(image: qedfuse.Image) -> None:
        for one in (1, Number(1), True):
            assert await image.read(one, one) == DATA[1:2]
            await image.write(one, b"x")
            await image.zero(one, one)
            await image.discard(one, one)
            assert sum(run.length for run in await image.map(one, one)) == 1
            await image.write(one, DATA[1:2])
        await image.resize(Number(512))
        assert image.size == 512

    using(path, main)


def test_huge_numbers(path: Path) -> None:
    async def main(image: qedfuse.Image) -> None:
        for huge in (SIZE, (1 << 62) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30):
            assert await image.read(huge, 10) == b""
            assert await image.read(SIZE - 10, huge) == bytes(10)
            assert await image.map(huge, 5) == []
            assert (await image.map(0, huge))[0] == (qedfuse.Kind.DATA, CLUSTER, 5 * CLUSTER)
            await image.zero(huge, 5)
            await image.discard(huge, 5)
            assert await image.read(0, SIZE) == DATA[:CLUSTER] + bytes(SIZE - CLUSTER)
            if huge > SIZE:
                with raises_errno(errno.EFBIG):
                    await image.write(huge, b"x")
                with raises_errno(errno.EFBIG):
                    await image.resize(huge)
        assert image.size == SIZE
        await image.discard(CLUSTER, 10**30)
        await image.zero(512, 10**30)
        assert await image.read(0, 10**30) == DATA[:512] + bytes(SIZE - 512)

    using(path, main)


def test_a_fixed_size(path: Path) -> None:
    async def main(image: qedfuse.Image) -> None:
        assert image.fixed_size
        with raises_errno(errno.ENOSPC):
            await image.write(10**30, b"x")
        with raises_errno(errno.EPERM):
            await image.resize(10**30)
        assert image.size == SIZE

    using(path, main, fixed_size=True)


class Pair(ctypes.Structure):
    _fields_ = (("one", ctypes.c_uint8), ("two", ctypes.c_uint32))


@pytest.mark.parametrize(
    "data",
    [
        b"bytes",
        bytearray(b"bytearray"),
        memoryview(b"memoryview")[1:5],
        array("I", [1, 2, 3]),
        array("I"),
        memoryview(bytes(range(64))).cast("I", (4, 4)),
        (ctypes.c_uint16 * 3)(1, 2, 3),
        (Pair * 2)(),
        memoryview(b""),
    ],
    ids=lambda data: type(data).__name__,
)
def test_whatever_lies_in_memory_is_written(path: Path, data: bytes) -> None:
    expected = memoryview(data).tobytes()

    async def main(image: qedfuse.Image) -> None:
        await image.write(1000, data)
        assert await image.read(1000, len(expected)) == expected
        assert await image.read(0, 1000) == DATA[:1000]
        assert await image.read(1000 + len(expected), 1000) == DATA[1000 + len(expected) :][:1000]

    using(path, main)


def test_a_buffer_is_the_callers_again_after_the_call(path: Path) -> None:
    async def main(image: qedfuse.Image) -> None:
        data = bytearray(b"x" * 1000)
        await image.write(0, data)
        data.append(1)
        with pytest.raises(ValueError, match="negative"):
            await image.write(-1, data)
        data.append(1)

    using(path, main)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ("text", TypeError),
        (5, TypeError),
        (None, TypeError),
        ([1, 2], TypeError),
        (memoryview(bytes(64))[::2], BufferError),
        (memoryview(bytes(64))[::-1], BufferError),
    ],
    ids=["str", "int", "None", "list", "every other byte", "backwards"],
)
def test_what_is_no_memory_is_not_written(path: Path, data: bytes, error: type[Exception]) -> None:
    async def main(image: qedfuse.Image) -> None:
        for offset in (0, SIZE, 10**30):
            with pytest.raises(error):
                await image.write(offset, data)
        assert image.size == SIZE

    before = path.read_bytes()
    using(path, main)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", CHANGES)
def test_a_read_only_image_is_not_changed(path: Path, name: str) -> None:
    async def main(image: qedfuse.Image) -> None:
        with pytest.raises(qedfuse.ReadOnlyError, match=f"^{path}: is open read-only$") as caught:
            await CHANGES[name](image)
        assert caught.value.errno == errno.EROFS
        await image.flush()

    before = path.read_bytes()
    using(path, main, read_only=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("bad", [3, None, 1.5, ["disk.qed"]])
def test_names_that_are_none(bad: str) -> None:
    async def main() -> None:
        with pytest.raises(TypeError):
            async with qedfuse.open_image(bad):
                pass

    run(main)


def test_other_bad_arguments_of_open(path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="null"):
            async with qedfuse.open_image("a\0b"):
                pass
        with raises_errno(errno.ENOENT):
            async with qedfuse.open_image(""):
                pass
        with raises_errno(errno.EINVAL):  # only to look
            async with qedfuse.open_image(path, share=True):
                pass
        with pytest.raises(TypeError, match="BackingPolicy"):
            async with qedfuse.open_image(path, policy=None):  # type: ignore[arg-type]
                pass

    run(main)


# -- the runs of a map ------------------------------------------------------------------------------------------------


def test_map_tells_what_the_image_itself_has(tmp_path: Path) -> None:
    make_raw(tmp_path / "base.raw")
    path = make_qed(tmp_path / "top.qed", "base.raw", raw=True)

    async def main(image: qedfuse.Image) -> None:
        assert image.backing == str(tmp_path / "base.raw")
        cluster = image.header.cluster_size
        await image.write(cluster, b"x" * 10)
        await image.zero(2 * cluster, cluster)
        runs: list[qedfuse.Run] = []
        while (offset := sum(run.length for run in runs)) < image.size:
            runs += await image.map(offset, image.size - offset)
        kinds = [qedfuse.Kind.UNALLOCATED, qedfuse.Kind.DATA, qedfuse.Kind.ZERO, qedfuse.Kind.UNALLOCATED]
        assert [run.kind for run in runs] == kinds
        assert [run.length for run in runs] == [cluster, cluster, cluster, SIZE - 3 * cluster]

    using(path, main)


# -- too late, and from elsewhere -------------------------------------------------------------------------------------


@EACH_CALL
def test_after_the_block_it_is_closed(path: Path, call: Call) -> None:
    async def main() -> None:
        async with qedfuse.open_image(path) as image:
            await call(image)
        status = os.stat(path)
        with pytest.raises(qedfuse.QedfuseError, match=f"^{path}: the image is closed$") as caught:
            await call(image)
        assert caught.value.errno == errno.EBADF
        assert os.stat(path).st_mtime_ns == status.st_mtime_ns
        assert image.path == str(path)
        assert image.writable
        assert image.failed is None
        assert image.header.cluster_size == CLUSTER
        assert image.backing is None

    run(main)


def test_closing_waits_for_calls_in_progress(tmp_path: Path) -> None:
    """Tasks that outlive the block: what they wrote before it ended is there, and then they are told."""
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", path, LARGE)
    written = [0] * 4

    async def write_on_and_on(image: qedfuse.Image, number: int) -> None:
        with raises_errno(errno.EBADF):
            while True:
                await image.write((number << 24) + written[number], b"x" * (CLUSTER + 512))
                written[number] += CLUSTER + 512

    async def main() -> None:
        async with trio.open_nursery() as nursery, qedfuse.open_image(path) as image:
            for number in range(4):
                nursery.start_soon(write_on_and_on, image, number)
            while min(written) < MIB:
                await trio.lowlevel.checkpoint()
        async with qedfuse.open_image(path, read_only=True) as image:
            for number, size in enumerate(written):
                assert await image.read(number << 24, size) == b"x" * size

    run(main)
    check_is_clean(path)


@EACH_CALL
def test_another_run_of_trio_is_told(path: Path, call: Call) -> None:
    before = path.read_bytes()

    async def main(image: qedfuse.Image) -> None:
        def from_its_own_run() -> None:
            with pytest.raises(RuntimeError, match=r"belongs to the trio\.run"):
                trio.run(call, image)

        await trio.to_thread.run_sync(from_its_own_run)
        assert image.size == SIZE

    using(path, main)
    assert path.read_bytes() == before


def test_another_event_loop_is_told(path: Path) -> None:
    async def main(image: qedfuse.Image) -> None:
        def without_trio() -> None:
            with pytest.raises(RuntimeError):
                asyncio.run(image.read(0, 512))

        await trio.to_thread.run_sync(without_trio)

    using(path, main)


def test_threads_call_by_way_of_trio(path: Path) -> None:
    async def main(image: qedfuse.Image) -> None:
        assert await trio.to_thread.run_sync(trio.from_thread.run, image.read, 0, 512) == DATA[:512]

    using(path, main)


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")
def test_a_generator_that_is_left(path: Path) -> None:
    """Trio ends it in a task of its own."""

    async def first_bytes() -> AsyncGenerator[bytes, None]:
        async with qedfuse.open_image(path) as image:
            await image.write(CLUSTER, b"written")
            while True:
                yield bytes(await image.read(0, 512))

    async def main() -> None:
        async for data in first_bytes():
            assert data == DATA[:512]
            break
        gc.collect()
        with trio.fail_after(30):
            while True:
                try:
                    async with qedfuse.open_image(path) as image:
                        assert await image.read(CLUSTER, 7) == b"written"
                    return
                except qedfuse.InUseError:
                    await trio.sleep(0.01)

    run(main)


def test_an_interrupt_closes_the_image(path: Path) -> None:
    program = """
import signal, sys, trio, qedfuse

async def main():
    async with qedfuse.open_image(sys.argv[1]) as image:
        await image.write(0, b"written")
        signal.raise_signal(signal.SIGINT)
        while True:
            await image.read(0, 512)

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    trio.run(main)
except KeyboardInterrupt:
    print("interrupted")
"""
    assert python(program, path) == "interrupted\n"
    check_is_clean(path)
    assert (path.read_bytes()[5 * CLUSTER :])[:7] == b"written"


def test_the_readme_is_right(path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    qemu_img("resize", "-q", "-f", "qed", path, "4M")
    assert python(program, path, cwd=path.parent) == ""
    flat = path.with_suffix(".raw")
    qemu_img("convert", "-f", "qed", "-O", "raw", path, flat)
    assert flat.read_bytes()[MIB : MIB + 6] == b"hello\0"


def python(program: str, *arguments: object, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment({"PYTHONPATH": str(ROOT)}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
