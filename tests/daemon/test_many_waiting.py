"""One image's trouble is its own: however many wait for it, others are served."""

from __future__ import annotations

import os
import resource
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qedfuse.host.limits import most_requests
from tests.helpers.mounts.injection import injected
from tests.helpers.mounts.modes import MODES, Mode
from tests.helpers.mounts.mounts import mounted, wait_until
from tests.helpers.qemu.cli import qemu_img, qemu_io

MANY = 150


def slow_syncs(pid: int, seconds: float) -> AbstractContextManager[None]:
    """Each of the daemon's syncs takes so long, or until the end of the block."""
    return injected(pid, f"fdatasync:delay_enter={int(seconds * 1e6)}", seconds=60)


def mark_unclean(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(16)
        features = int.from_bytes(file.read(8), "little")
        file.seek(16)
        file.write((features | 2).to_bytes(8, "little"))


@MODES
def test_opens_that_wait_for_a_repair_keep_no_other_image_waiting(tmp_path: Path, mode: Mode) -> None:
    source, point = tmp_path / "images", tmp_path / "mnt"
    source.mkdir()
    point.mkdir()
    for name in ("broken", "good"):
        qemu_img("create", "-q", "-f", "qed", source / f"{name}.qed", "1M")
        qemu_io(source / f"{name}.qed", "write -P 7 0 64k")
    mark_unclean(source / "broken.qed")
    opened: list[int] = []

    def open_it() -> None:
        opened.append(os.open(point / "broken.raw", os.O_RDWR))

    with mounted(*mode, source, point) as mount:
        threads = [threading.Thread(target=open_it) for _ in range(MANY)]
        try:
            with slow_syncs(mount.pid(), 40):
                for thread in threads:
                    thread.start()
                wait_until(lambda: "checking it" in mount.text())
                time.sleep(2)  # for all of them to wait
                for name in ("good", "broken"):  # readers need no repair
                    assert (point / f"{name}.raw").read_bytes()[:65536] == b"\7" * 65536
                assert "is consistent" not in mount.text()
        finally:
            for thread in threads:
                thread.join()
            for fd in opened:
                os.close(fd)
    assert len(opened) == MANY
    qemu_img("check", source / "broken.qed")


def test_as_many_as_the_address_space_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = [resource.RLIM_INFINITY]
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (limit[0], limit[0]))
    assert most_requests() > 5000
    limit[0] = 1 << 30
    assert 200 < most_requests() < 300
    limit[0] = 1 << 20
    assert most_requests() == 99
