"""Block devices to put images on: loop devices, which never outlive their test."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.mounts.guests import detach, need_guest

SECTOR = 512


@contextmanager
def device_with(image: Path, size: int, *, read_only: bool = False, sector: int = SECTOR) -> Iterator[Path]:
    """A device of `size` bytes that begins as `image` does, and holds stale bytes behind that."""
    need_guest("losetup", "blockdev")
    content = image.read_bytes()
    assert len(content) <= size and size % sector == 0
    file = image.with_name(image.name + ".device")
    file.write_bytes(content + (b"stale..." * (size // 8))[: size - len(content)])
    words = ["losetup", "--find", "--show", "--sector-size", str(sector), *(["--read-only"] if read_only else [])]
    done = subprocess.run([*words, str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device to be had: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        detach(device)


def qemu_is_refused(path: Path) -> bool:
    """Whether QEMU may not open an image for writing."""
    command = ["qemu-io", "-f", "qed", "-c", "read 0 512", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode != 0 and "lock" in done.stderr
