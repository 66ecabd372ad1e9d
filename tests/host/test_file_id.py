"""Which file it is, whatever name led to it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from qedfuse.host.file_id import FileId

PACKAGE = Path(__file__).parents[2] / "qedfuse"


def test_a_file_is_the_same_by_all_its_names(tmp_path: Path) -> None:
    one, link, name, other = (tmp_path / name for name in ("one", "link", "name", "other"))
    one.touch()
    os.link(one, link)
    name.symlink_to(one)
    other.touch()
    assert FileId.at(one) == FileId.at(link) == FileId.at(name) != FileId.at(other)


def test_a_block_device_is_the_same_by_all_its_nodes() -> None:
    def node(inode: int, number: int) -> FileId:
        return FileId.of(os.stat_result((stat.S_IFBLK, inode, 5, 1, 0, 0, 0, 0, 0, 0), {"st_rdev": number}))

    assert node(1, os.makedev(7, 1)) == node(2, os.makedev(7, 1))
    assert node(1, os.makedev(7, 1)) != node(1, os.makedev(7, 2))


def test_a_device_is_no_file_of_that_number() -> None:
    device = os.stat_result((stat.S_IFBLK, 3, 5, 1, 0, 0, 0, 0, 0, 0), {"st_rdev": 9})
    assert FileId.of(device) != FileId.of(os.stat_result((stat.S_IFREG, 9, 5, 1, 0, 0, 0, 0, 0, 0)))


def test_nothing_else_tells_files_apart() -> None:
    """A comparison of inodes is wrong for block devices. What the kernel lists of a lock has the inode alone."""
    compares = re.compile(r"\.st_ino\b(?! = )|samefile")
    files = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if compares.search(file.read_text())}
    assert files == {"host/file_id.py", "host/lock_holder.py"}
