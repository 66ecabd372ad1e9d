"""What the sidecar does beside the daemon: an image that is closed meanwhile is closed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from qedfuse.host.image_lock import lock
from qedfuse.native import _sidecar


def test_locks_last_no_longer_than_a_descriptor(tmp_path: Path) -> None:
    """A child with a copy of the descriptors would hold an image's locks for a moment after it was closed."""
    image, file = tmp_path / "image", tmp_path / "file"
    image.touch()
    file.touch()
    device = file.stat().st_dev
    ended = threading.Event()
    errands = 0

    def run_errands() -> None:
        nonlocal errands
        while not ended.is_set():
            _sidecar.set_times(str(file), device, 1, 1)
            errands += 1

    thread = threading.Thread(target=run_errands)
    thread.start()
    try:
        for _ in range(3000):
            fd = os.open(image, os.O_RDWR)
            try:
                lock(fd, str(image), writable=True)
            finally:
                os.close(fd)
    finally:
        ended.set()
        thread.join()
    assert errands > 100
