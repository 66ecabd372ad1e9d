"""Ctrl-C in a program that uses the library: at any line of the engine, the call is as if it had been cancelled."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trio

import qedfuse
from qedfuse.check.check import check_image
from qedfuse.check.result import CheckResult
from qedfuse.host.file_storage import FileStorage
from qedfuse.qed.header_io import read_header
from qedfuse.qed.image import Image
from tests.helpers.qemu.cli import ROOT, qemu_img

SIZE = 1 << 20
BASE = b"b" * SIZE
FILES = {str(file) for name in ("qed", "host", "chain") for file in (ROOT / "qedfuse" / name).glob("*.py")}
FILES.add(str(ROOT / "qedfuse" / "library.py"))
#: How often it is tried, of some two thousand lines.
POINTS = 60


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """As at a terminal; in the background they are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "base.raw").write_bytes(BASE)
    image = tmp_path / "disk.qed"
    options = ["-o", "cluster_size=4k,table_size=2", "-b", "base.raw", "-F", "raw"]
    qemu_img("create", "-q", "-f", "qed", *options, image, str(SIZE))
    return image


class Interrupt:
    """A trace function: SIGINT comes before the line of the engine that is the `number`-th to run. `line`: which."""

    def __init__(self, number: int) -> None:
        self.line = ""
        self.count = 0
        self._number = number

    def __call__(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        return self._local if frame.f_code.co_filename in FILES else None

    def _local(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self._number:
                self.line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self._local


class Session:
    """A program's changes to an image, what they should come to, and the range that the interrupted one was for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = bytearray(BASE)
        self.unsure = (0, 0)

    async def change(self, image: qedfuse.Image, offset: int, data: bytes) -> None:
        self.unsure = (offset, len(data))
        if any(data):
            await image.write(offset, data)
        else:
            await image.zero(offset, len(data))
        self.model[offset : offset + len(data)] = data
        self.unsure = (0, 0)

    async def run(self, interrupt: Interrupt) -> None:
        try:
            async with qedfuse.open_image(self.path) as image:
                await self.change(image, 0, b"first")
                await image.flush()
                sys.settrace(interrupt)
                for offset, size in ((8000, 10_000), (300_000, 5000), (8000, 100)):
                    await self.change(image, offset, b"x" * size)
                await image.flush()
                await self.change(image, 8192, bytes(20_000))
                await image.flush()
                await self.change(image, 500_000, b"y" * 5000)
        finally:
            sys.settrace(None)

    async def verify(self) -> None:
        async with qedfuse.open_image(self.path, read_only=True) as image:
            found = await image.read(0, SIZE)
            offset, size = self.unsure
            assert found[:offset] == self.model[:offset]
            assert found[offset + size :] == self.model[offset + size :]


async def checked(path: Path) -> CheckResult:
    storage = FileStorage.open(path, writable=False)
    try:
        return await check_image(storage, await read_header(storage))
    finally:
        await storage.close()


def test_at_any_line(path: Path) -> None:
    template = path.with_suffix(".new")
    shutil.copyfile(path, template)
    everything = Interrupt(0)
    trio.run(Session(path).run, everything)
    assert everything.count > 1000
    for number in sorted(random.Random(1).sample(range(1, everything.count), POINTS)):
        shutil.copyfile(template, path)
        session, interrupt = Session(path), Interrupt(number)
        try:
            trio.run(session.run, interrupt)
        except KeyboardInterrupt:
            assert interrupt.line
        else:
            assert not interrupt.line, f"{interrupt.line}: the interrupt is lost"
        trio.run(session.verify)
        result = trio.run(checked, path)
        assert (result.corruptions, result.check_errors) == (0, 0), interrupt.line
        assert result.leaks <= 10, interrupt.line


def test_closing_comes_to_its_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is asked for."""
    real_close = Image.close

    async def close(self: Image) -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            await trio.sleep(0.01)
        await real_close(self)

    async def main() -> None:
        async with qedfuse.open_image(path) as image:
            await image.write(8000, b"written")

    with monkeypatch.context() as patch:
        patch.setattr(Image, "close", close)
        with pytest.raises(KeyboardInterrupt):
            trio.run(main)

    async def read() -> bytes:
        async with qedfuse.open_image(path, read_only=True) as image:
            return bytes(await image.read(7999, 9))

    assert trio.run(read) == b"bwrittenb"


def test_a_write_in_a_thread_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses the caller's memory, and clusters that would be somebody else's."""
    ended: list[int] = []

    async def main() -> None:
        async with qedfuse.open_image(path) as image:
            await image.resize(8 << 20)
            real_write = FileStorage._write_all

            def slow_write(self: FileStorage, offset: int, buffers: Any) -> None:
                if sum(map(len, buffers)) > SIZE:
                    signal.pthread_kill(main_thread, signal.SIGINT)
                    time.sleep(0.3)
                    ended.append(offset)
                real_write(self, offset, buffers)

            with monkeypatch.context() as patch:
                patch.setattr(FileStorage, "_write_all", slow_write)
                try:
                    await image.write(0, b"z" * (3 << 20))
                except KeyboardInterrupt:
                    assert ended
                    raise

    main_thread = threading.get_ident()
    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    result = trio.run(checked, path)
    assert (result.corruptions, result.check_errors) == (0, 0)
