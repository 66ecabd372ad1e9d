"""What a raw file's stat says."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from qedfuse.fuse.attributes import directory_attributes, raw_attributes
from qedfuse.fuse.options import MountOptions

PLAIN = MountOptions()


@pytest.fixture
def status(tmp_path: Path) -> os.stat_result:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 100_000)
    path.chmod(0o4757)
    os.utime(path, ns=(1_000_000_001, 2_000_000_003))
    return path.stat()


def test_owner_mode_and_times_are_the_images(status: os.stat_result) -> None:
    found = raw_attributes(status, 1 << 20, 8, writable=True, options=PLAIN)
    assert found.mode == stat.S_IFREG | 0o646
    assert (found.uid, found.gid) == (status.st_uid, status.st_gid)
    assert (found.atime_ns, found.mtime_ns, found.ctime_ns) == (1_000_000_001, 2_000_000_003, status.st_ctime_ns)
    assert (found.size, found.blocks, found.nlink) == (1 << 20, 8, 1)


def test_nobody_may_write_what_is_read_only(status: os.stat_result) -> None:
    assert raw_attributes(status, 512, 1, writable=False, options=PLAIN).mode == stat.S_IFREG | 0o444
    options = MountOptions(umask=0)
    assert raw_attributes(status, 512, 1, writable=False, options=options).mode == stat.S_IFREG | 0o444


def test_overrides(status: os.stat_result) -> None:
    options = MountOptions(uid=7, gid=8, umask=0o027)
    found = raw_attributes(status, 512, 1, writable=True, options=options)
    assert (found.mode, found.uid, found.gid) == (stat.S_IFREG | 0o640, 7, 8)
    found = directory_attributes(status, options)
    assert (found.mode, found.uid, found.gid) == (stat.S_IFDIR | 0o550, 7, 8)


@pytest.mark.parametrize(
    ("size", "host", "shown"),
    [(0, 0, 0), (0, 100, 0), (512, 0, 1), (512, 100, 1), (1 << 20, 0, 1), (1 << 20, 5, 5), (1 << 20, 3000, 2048)],
)
def test_blocks_never_exceed_the_size_and_are_never_none(
    status: os.stat_result, size: int, host: int, shown: int
) -> None:
    assert raw_attributes(status, size, host, writable=True, options=PLAIN).blocks == shown


def test_a_directory_is_not_writable(status: os.stat_result) -> None:
    assert directory_attributes(status, PLAIN).mode == stat.S_IFDIR | 0o555
