"""What an application may do to an image, at many offsets, for `zygote.py`: only OSErrors may come out."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from qedfuse.chain.opening import open_image
from qedfuse.qed.image import Image
from qedfuse.sizes import whole_sectors
from qedfuse.text import describe

#: Guest offsets that crafted tables map, in clusters of 4 KiB.
CLUSTERS = [0, 1, 2, 3, 4, 5, 6, 7, 511, 512, 1023, 1024, 2048]


class Report:
    """Counts of what succeeded, and the errors by what failed."""

    def __init__(self) -> None:
        self.done = 0
        self.errors: dict[str, str] = {}

    async def attempt(self, name: str, action: Callable[[], Awaitable[object]]) -> object:
        try:
            result = await action()
        except OSError as error:
            failure = error
        else:
            self.done += 1
            return result
        line = describe(failure)
        assert failure.errno in errno.errorcode and line and "\n" not in line, repr(failure)
        self.errors[name] = line
        return None


def read(args: list[str]) -> int:
    """Open PATH read-only, and read and map it."""
    return trio.run(_survey, args[0], True)


def write(args: list[str]) -> int:
    """Open PATH for writing, and read, write, zero, discard, flush and resize it."""
    return trio.run(_survey, args[0], False)


async def _survey(path: str, read_only: bool) -> int:
    report = Report()
    try:
        async with _opened(report, path, read_only) as image:
            if image is not None:
                await _read(report, image)
                if not read_only:
                    await _write(report, image)
                    await _read(report, image)
    except OSError as error:  # of closing
        report.errors["close"] = describe(error)
    print(json.dumps({"done": report.done, "errors": report.errors}))
    return 0


@asynccontextmanager
async def _opened(report: Report, path: str, read_only: bool) -> AsyncIterator[Image | None]:
    manager = open_image(path, read_only=read_only)
    try:
        image = await manager.__aenter__()
    except OSError as error:
        report.errors["open"] = describe(error)
        yield None
        return
    try:
        yield image
    finally:
        await manager.__aexit__(None, None, None)


def _offsets(size: int) -> list[int]:
    places = [cluster * 4096 for cluster in CLUSTERS]
    places += [size // 3 // 512 * 512, size // 2 + 1, size - 512, size - 1]
    return sorted({place for place in places if 0 <= place < size})


async def _read(report: Report, image: Image) -> None:
    size = image.size
    for at in _offsets(size):
        for length in (1, 4096, 20000):
            data = await report.attempt(f"read {at:#x}", lambda at=at, length=length: image.read(at, length))  # type: ignore[misc]
            assert data is None or len(data) == min(length, size - at)  # type: ignore[arg-type]
        runs = await report.attempt(f"map {at:#x}", lambda at=at: image.map(at, min(size - at, 1 << 20)))  # type: ignore[misc]
        if runs is not None:
            assert 0 < sum(run.length for run in runs) <= size - at  # type: ignore[attr-defined]
            for run in runs:  # type: ignore[attr-defined]
                assert run.host + (run.length if run.host else 0) <= whole_sectors(image.storage.size())
    assert await image.read(size, 4096) == b""
    assert await image.read((1 << 63) - 4096, 4096) == b"" or size > (1 << 63) - 4096


async def _write(report: Report, image: Image) -> None:
    size = image.size
    for at in _offsets(size):
        data = at.to_bytes(8, "little") * 64
        done = await report.attempt(f"write {at:#x}", lambda at=at, data=data: image.write(at, data[: size - at]))  # type: ignore[misc]
        if done is None and f"write {at:#x}" not in report.errors:
            assert await image.read(at, len(data)) == data[: size - at]
        await report.attempt(f"zero {at:#x}", lambda at=at: image.zero(at + 1024, 5000))  # type: ignore[misc]
    await report.attempt("flush", image.flush)
    await report.attempt("discard", lambda: image.discard(0, 8 << 20))
    await report.attempt("flush", image.flush)
    for at in _offsets(size):
        await report.attempt(f"write again {at:#x}", lambda at=at: image.write(at, b"again" * 2000))  # type: ignore[misc]
    await report.attempt("flush", image.flush)
    await report.attempt("shrink", lambda: image.resize(max(image.size // 2, image.size - (64 << 20))))
    await report.attempt("grow", lambda: image.resize(size))
    await report.attempt("write past the end", lambda: image.write(image.size + 8192, b"end"))
    await report.attempt("grow too far", lambda: image.resize((1 << 63) - 512))
    await report.attempt("flush", image.flush)
