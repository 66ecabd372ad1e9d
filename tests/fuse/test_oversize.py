"""Buffered writes past what an image's geometry can map: told once, logged, and the raw file has its size again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qedfuse.native import _sidecar
from tests.helpers.images.chains import check_is_clean, qemu_bytes
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.mounts import mounted, mountpoint, wait_until
from tests.helpers.qemu.cli import qemu_img

MIB = 1 << 20
#: 1024 * 1024 clusters of 4 KiB.
LIMIT = 4 << 30


@pytest.mark.parametrize("over_file", [True, False], ids=["file", "directory"])
def test_a_write_that_is_too_far_out(tmp_path: Path, over_file: bool) -> None:
    image = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=4096,table_size=2", image, MIB)
    point, raw = mountpoint(tmp_path, over_file=over_file)
    with mounted(image, point) as mount:
        for size in (2 * MIB, 3 * MIB):
            with raw.open("r+b", buffering=0) as file:
                file.seek(size - 5000)
                file.write(b"inside" * 100)
                file.seek(size - 512)
                file.write(b"end" * 100)
                file.seek(LIMIT + 5 * MIB)
                for _ in range(100):
                    file.write(b"lost" * 1000)
                with pytest.raises(OSError, match=r".") as caught:
                    os.fsync(file.fileno())
                assert caught.value.errno == errno.EFBIG
                wait_until(lambda size=size: raw.stat().st_size == size)
                os.fsync(file.fileno())
                file.seek(100)
                file.write(b"more")
                os.fsync(file.fileno())
            assert raw.stat().st_size == size
        lines = [line for line in mount.text().splitlines() if "this image can have at most 4294967296 bytes" in line]
        assert 2 <= len(lines) <= 10, lines
        assert "warning" not in mount.text().lower().replace("no native fast path", ""), mount.text()
        expected = raw.read_bytes()
    assert len(expected) == 3 * MIB
    for size in (2 * MIB, 3 * MIB):
        assert expected[size - 5000 :][:600] == b"inside" * 100
        assert expected[size - 512 :][:300] == b"end" * 100
    assert b"lost" not in expected
    assert qemu_bytes(image) == expected
    check_is_clean(image)


def test_direct_io_tells_at_once(tmp_path: Path) -> None:
    image, raw = tmp_path / "disk.qed", tmp_path / "disk.raw"
    qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=4096,table_size=2", image, MIB)
    raw.touch()
    with mounted(image, raw, "-o", "direct_io"), raw.open("r+b", buffering=0) as file:
        file.seek(LIMIT)
        with pytest.raises(OSError, match="too large"):
            file.write(b"x")
        assert raw.stat().st_size == MIB


def test_only_what_is_over_the_limit_is_cut_and_nothing_else_is_touched(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"x" * 5000)
    link.symlink_to(file)
    place = os.fsencode(file), file.stat().st_dev, file.stat().st_ino

    for path, device, inode, code in (
        (file, 1, 0, errno.ENODEV),
        (file, 0, 1, errno.ESTALE),
        (tmp_path / "no", 0, 0, errno.ENOENT),
    ):
        with raises_errno(code):
            _sidecar.cut(os.fsencode(path), place[1] + device, place[2] + inode, 100)
    with raises_errno(errno.EINVAL):  # truncate(2) of a link itself
        _sidecar.cut(os.fsencode(link), place[1], link.lstat().st_ino, 0)
    assert _sidecar.cut(*place, 5000) == 5000
    assert file.read_bytes() == b"x" * 5000
    assert _sidecar.cut(*place, 100) == 5000
    assert file.read_bytes() == b"x" * 101
