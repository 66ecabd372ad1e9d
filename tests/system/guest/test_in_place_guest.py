"""A guest's disk becomes a QED image in place, is used, and becomes a raw disk again: its files are all there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.mounts.guests import (
    MKFS,
    assert_clean,
    checksums,
    filesystem,
    loop_device,
    make_tree,
    need_filesystem,
    need_guest,
    run,
)
from tests.helpers.mounts.mounts import mounted, need_fuse
from tests.helpers.qemu.cli import qedfuse

MIB = 1 << 20


def convert(path: Path, source: str, target: str) -> None:
    done = qedfuse("convert", "--in-place", "-f", source, "-O", target, path)
    assert done.code == 0, done


@pytest.mark.guest
@pytest.mark.parametrize("name", sorted(MKFS))
def test_there_and_back(tmp_path: Path, name: str) -> None:
    need_guest(MKFS[name][0])
    need_filesystem(name)
    need_fuse()
    disk, raw, guest = tmp_path / "disk", tmp_path / "disk.raw", tmp_path / "guest"
    raw.touch()
    with disk.open("wb") as file:
        file.truncate(400 * MIB)
    run(*MKFS[name], disk)
    with loop_device(disk) as loop, filesystem(loop, guest):
        make_tree(guest, seed=1)
        before = checksums(guest)
    convert(disk, "raw", "qed")
    assert_clean(disk)
    with mounted(disk, raw), loop_device(raw) as loop, filesystem(loop, guest):
        assert checksums(guest) == before
        make_tree(guest / "more", seed=2)
        after = checksums(guest)
    assert_clean(disk)
    convert(disk, "qed", "raw")
    assert disk.stat().st_size == 400 * MIB
    with loop_device(disk) as loop:
        with filesystem(loop, guest):
            assert checksums(guest) == after
        if name == "ext4":
            run("e2fsck", "-fn", loop)
