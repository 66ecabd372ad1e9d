"""Several processes append to one raw file: no record is lost, torn or written over another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.mounts import appending
from tests.helpers.mounts.appending import HEAD, SECTOR, record
from tests.helpers.mounts.modes import MODES, Mode
from tests.helpers.mounts.mounts import mounted
from tests.helpers.qemu.cli import TIMEOUT, qemu_img

WRITERS, RECORDS = 3, 40


def split(data: bytes) -> list[tuple[int, int, int]]:
    """The records, each whole: writer, number and sectors."""
    result = []
    while data:
        number, turn, first, sectors = HEAD.unpack(data[: HEAD.size])
        assert first == 0 and data[: sectors * SECTOR] == record(number, turn, sectors), (number, turn, first)
        result.append((number, turn, sectors))
        data = data[sectors * SECTOR :]
    return result


@MODES
@pytest.mark.parametrize("options", ["", "direct_io"])
@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["plain", "O_DIRECT"])
def test_what_several_processes_append(tmp_path: Path, mode: Mode, options: str, flags: int) -> None:
    image, raw, flat = tmp_path / "disk.qed", tmp_path / "disk.raw", tmp_path / "flat.raw"
    raw.touch()
    qemu_img("create", "-q", "-f", "qed", image, "1M")
    with mounted(*mode, *(("-o", options) if options else ()), image, raw):
        words = [
            [sys.executable, appending.__file__, str(raw), str(n), str(RECORDS), str(flags)] for n in range(WRITERS)
        ]
        writers = [subprocess.Popen(each) for each in words]
        assert [writer.wait(TIMEOUT) for writer in writers] == [0] * WRITERS
        data = raw.read_bytes()
    qemu_img("convert", "-f", "qed", "-O", "raw", image, flat)
    assert flat.read_bytes() == data
    assert not any(data[: 1 << 20])
    records = split(data[1 << 20 :])
    for number in range(WRITERS):
        assert [turn for writer, turn, _ in records if writer == number] == list(range(1, RECORDS + 1))
