"""A guest's file system in an overlay that is rebased, committed, and rebased again: its files stay what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.images.conversions import qemu_finds_no_error
from tests.helpers.mounts.guests import checksums, filesystem, loop_device, make_tree, need_filesystem, need_guest, run
from tests.helpers.mounts.mounts import mounted
from tests.helpers.qemu.cli import new_image, qedfuse


class Guest:
    """An ext4 in an image, on a mount of ours."""

    def __init__(self, directory: Path) -> None:
        self.raw = directory / "disk.raw"
        self.raw.touch()
        self.tree = directory / "guest"

    def change(self, image: Path, seed: int) -> dict[str, str]:
        """Add a tree of files, remove the one before. Returns all checksums."""
        with mounted(image, self.raw), loop_device(self.raw) as loop, filesystem(loop, self.tree):
            if (self.tree / str(seed - 1)).exists():
                run("rm", "-r", self.tree / str(seed - 1))
            (self.tree / str(seed)).mkdir()
            make_tree(self.tree / str(seed), seed, files=40)
            found = checksums(self.tree)
            run("fstrim", self.tree)
            return found

    def check(self, image: Path, expected: dict[str, str]) -> None:
        qemu_finds_no_error(image)
        with mounted("--ro", image, self.raw), loop_device(self.raw, "--read-only") as loop:
            run("e2fsck", "-fn", loop)
            with filesystem(loop, self.tree, "-o", "ro,noload"):
                assert checksums(self.tree) == expected


@pytest.mark.guest
def test_an_ext4(tmp_path: Path) -> None:
    need_guest("mkfs.ext4", "e2fsck", "fstrim")
    need_filesystem("ext4")
    base, middle, top = (tmp_path / name for name in ("base.raw", "middle.qed", "top.qed"))
    with base.open("wb") as file:
        file.truncate(48 << 20)
    run("mkfs.ext4", "-q", "-F", base)
    guest = Guest(tmp_path)
    new_image(middle, "48M", "-b", base, "-F", "raw")
    guest.change(middle, 1)
    new_image(top, "48M", "-b", middle, "-F", "qed")
    files = guest.change(top, 2)

    assert qedfuse("rebase", "-b", base, "-F", "raw", top).code == 0
    guest.check(top, files)
    assert qedfuse("rebase", "-b", middle, "-F", "qed", top).code == 0
    guest.check(top, files)
    assert qedfuse("commit", top).code == 0
    guest.check(top, files)
    guest.check(middle, files)
    assert qedfuse("commit", middle).code == 0
    guest.check(top, files)
    files = guest.change(top, 3)
    assert qedfuse("rebase", "-b", "", top).code == 0
    base.unlink()
    middle.unlink()
    guest.check(top, files)
