"""What is done to an image by a tool, while nothing serves it."""

from __future__ import annotations

import time

from tests.bench.measures import SIZE, Context, fill, mapped_terabyte
from tests.bench.targets import Target, run


def info_time(target: Target, context: Context) -> float:
    """Seconds that the target's own `info` takes, start of the interpreter included."""
    target.create(str(SIZE))
    started = time.monotonic()
    run(*target.tool, "info", target.image)
    return time.monotonic() - started


def convert_to_qed(target: Target, context: Context) -> float:
    """Seconds until a raw file is a QED image, durably: one of the tools syncs by itself."""
    started = time.monotonic()
    run(*target.tool, "convert", "-f", "raw", "-O", "qed", context.source, target.image)
    run("sync", target.image)
    return time.monotonic() - started


def convert_to_raw(target: Target, context: Context) -> float:
    """Seconds until a full QED image is a raw file, durably."""
    fill(target, context)
    flat = target.scratch / "converted.raw"
    try:
        started = time.monotonic()
        run(*target.tool, "convert", "-f", "qed", "-O", "raw", target.image, flat)
        run("sync", flat)
        return time.monotonic() - started
    finally:
        flat.unlink(missing_ok=True)


def check_terabyte(target: Target, context: Context) -> float:
    """Seconds to check 1 TiB, every cluster of it allocated. QEMU finds leaks in so large a file that are none."""
    mapped_terabyte(target)
    started = time.monotonic()
    run(*target.tool, "check", target.image, fine=(0, 3))
    return time.monotonic() - started
