"""Sources that a conversion would spoil, or that change under it: one line, and every file as it was."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from qedfuse.tools.convert import convert_image
from qedfuse.tools.rebase import rebase_image
from tests.helpers.images.conversions import MIB
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.guests import loop_device, need_guest
from tests.helpers.qemu.cli import one_line, qedfuse, qemu_img

# -- a loop device shows the one as the other --------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    need_guest("losetup")
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(4 * MIB))
    return path


def refused(source: Path, target: Path, *words: str) -> None:
    for more in ((), ("-n",)):
        one_line(qedfuse("convert", *more, *words, source, target), 1, str(target), "it is read from", str(source))


def test_a_loop_device_of_the_source(disk: Path) -> None:
    content = disk.read_bytes()
    with loop_device(disk) as loop:
        refused(disk, loop, "-f", "raw", "-O", "raw")
    assert disk.read_bytes() == content


@pytest.mark.parametrize("target", ["raw", "qed"])
def test_the_file_of_a_loop_device(disk: Path, target: str) -> None:
    content = disk.read_bytes()
    with loop_device(disk) as loop:
        refused(loop, disk, "-f", "raw", "-O", target)
    assert disk.read_bytes() == content


def test_a_loop_device_of_a_file_below(disk: Path) -> None:
    content = disk.read_bytes()
    top = disk.with_name("top.qed")
    qemu_img("create", "-q", "-f", "qed", "-b", disk, "-F", "raw", top)
    with loop_device(disk) as loop:
        one_line(qedfuse("convert", "-f", "qed", "-O", "raw", top, loop), 1, str(loop), "it is read from", str(disk))
    assert disk.read_bytes() == content


def test_loop_devices_one_on_the_other(disk: Path) -> None:
    content = disk.read_bytes()
    with loop_device(disk) as lower, loop_device(lower) as upper:
        refused(disk, upper, "-f", "raw", "-O", "raw")
        refused(upper, disk, "-f", "raw", "-O", "raw")
    assert disk.read_bytes() == content


def test_a_partition(disk: Path) -> None:
    """The disk that it lies in is none to fill from it; another partition is."""
    table = "label: dos\n2048,2048,83\n4096,2048,83\n"
    subprocess.run(["sfdisk", "-q", str(disk)], input=table, text=True, check=True)
    content = disk.read_bytes()
    with loop_device(disk) as loop:
        first, second = (Path(f"{loop}p{number}") for number in (1, 2))
        if not first.is_block_device() or not second.is_block_device():
            pytest.skip("no partitions of loop devices")
        refused(first, disk, "-f", "raw", "-O", "raw")
        assert qedfuse("convert", "-f", "raw", "-O", "raw", first, second) == (0, "", "")
    assert disk.read_bytes() == content[: 2 * MIB] + content[MIB : 2 * MIB] + content[3 * MIB :]


# -- it becomes shorter ------------------------------------------------------------------------------------------------


def long_disk(path: Path) -> Path:
    """Data in more places than are looked for at a time."""
    with path.open("wb") as file:
        for number in range(100):
            file.seek(number * MIB)
            file.write(os.urandom(4096))
        file.truncate(100 * MIB)
    return path


def shrinking(path: Path) -> Callable[[int, int], None]:
    """Progress, at the first of which only the last of it goes."""
    return lambda _done, _total: os.truncate(path, 90 * MIB)


@pytest.mark.parametrize("target", ["raw", "qed"])
def test_where_it_has_not_been_looked_at(tmp_path: Path, target: str) -> None:
    """What is gone is not copied as zeroes."""
    one, out = long_disk(tmp_path / "disk"), tmp_path / "out"

    async def main() -> None:
        with raises_errno(errno.EIO):
            await convert_image(str(one), str(out), source_format="raw", target_format=target, progress=shrinking(one))

    trio.run(main)
    assert not out.exists()


def test_a_backing_file_that_is_rebased_from(tmp_path: Path) -> None:
    """It is still what is below the image."""
    base, top = long_disk(tmp_path / "disk"), tmp_path / "top.qed"
    qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "raw", top)

    async def main() -> None:
        with raises_errno(errno.EIO):
            await rebase_image(str(top), "", progress=shrinking(base))

    trio.run(main)
    assert f"backing file: {base}" in qedfuse("info", top).out
