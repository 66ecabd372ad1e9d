"""What is done to an image by a tool, while nothing serves it."""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.measures import SIZE, Context, mapped_terabyte
from tests.bench.targets import Target, run


def info_time(target: Target, context: Context) -> float:
    """Seconds that the target's own `info` takes, start of the interpreter included."""
    target.create(str(SIZE))
    started = time.monotonic()
    run(*target.tool, "info", target.image)
    return time.monotonic() - started


def sparse_source(directory: Path) -> Path:
    """A raw disk of 2 GiB, a fourth of it random data in runs of 64 KiB to 16 MiB, the rest holes; made once."""
    path = directory / "sparse.raw"
    if not path.exists():
        rnd = random.Random(1)
        with path.open("wb") as file:
            position = 0
            while position < 4 * SIZE:
                file.seek(position)
                size = rnd.choice((1, 1, 2, 4, 16, 64, 256)) << 16
                file.write(random.randbytes(size))
                position += size + (rnd.choice((1, 2, 4, 64, 512)) << 16)
            file.truncate(4 * SIZE)
            os.fsync(file.fileno())
    return path


def convert(source_format: str, *, sparse: bool = False, processor: bool = False) -> Callable[[Target, Context], float]:
    """Seconds until a raw file is a QED image, or the other way round, durably; of the clock, or of processor time.
    One of the tools syncs by itself."""
    target_format = "qed" if source_format == "raw" else "raw"

    def measure(target: Target, context: Context) -> float:
        source = sparse_source(context.source.parent) if sparse else context.source
        if source_format == "qed":
            target.fill(source)
            run("sync", target.image)
            source = target.image
        else:
            _read_all(source)
        converted = target.scratch / f"converted.{target_format}"
        try:
            started, used = time.monotonic(), _of_children()
            run(*target.tool, "convert", "-f", source_format, "-O", target_format, source, converted)
            run("sync", converted)
            return _of_children() - used if processor else time.monotonic() - started
        finally:
            converted.unlink(missing_ok=True)

    return measure


def _read_all(path: Path) -> None:
    """Have it in the page cache, as it is after it was written."""
    with path.open("rb") as file:
        while file.read(1 << 20):
            pass


def _of_children() -> float:
    """Seconds of processor time of all that has run and ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check_terabyte(target: Target, context: Context) -> float:
    """Seconds to check 1 TiB, every cluster of it allocated. QEMU finds leaks in so large a file that are none."""
    mapped_terabyte(target)
    started = time.monotonic()
    run(*target.tool, "check", target.image, fine=(0, 3))
    return time.monotonic() - started
