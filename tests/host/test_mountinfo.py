"""The kernel's table of mounts."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from qedfuse.host import mountinfo as mounts
from qedfuse.host.mountinfo import Mount, _Table, find_mount, mount_id, parse_mount
from qedfuse.host.unmount import unmount
from tests.helpers.judges.expect import raises_errno


def test_a_line() -> None:
    line = (
        b"36 35 0:53 / /mnt/a\\040b\\011c\\134 rw,nosuid shared:1 master:2 - "
        b"fuse.qedfuse /images/x\\040y.qed rw,user_id=1000,group_id=5\n"
    )
    found = parse_mount(line)
    assert found == Mount(
        *(36, 35, "0:53", "/", "/mnt/a b\tc\\", "fuse.qedfuse", "/images/x y.qed", "rw,user_id=1000,group_id=5")
    )
    assert (found.owner, found.st_dev, found.is_qedfuse) == (1000, os.makedev(0, 53), True)
    line = b"1 0 254:0 / / rw - ext4 /dev/root rw"
    found = parse_mount(line)
    assert found == Mount(1, 0, "254:0", "/", "/", "ext4", "/dev/root", "rw")
    assert (found.owner, found.st_dev, found.is_qedfuse) == (None, os.makedev(254, 0), False)


def test_the_mount_on_top_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "30 29 0:9 / /m rw - tmpfs top rw\n"
        "29 28 0:8 / /m rw - tmpfs middle rw\n"
        "28 1 0:7 / /m rw - tmpfs bottom rw\n"
        "31 1 0:10 / /mm rw - tmpfs other rw\n"
    )
    monkeypatch.setattr(mounts, "_MOUNTINFO", str(table))
    found = find_mount("/m")
    assert found is not None and found.source == "top"
    assert find_mount("/none") is None


def test_the_real_table() -> None:
    root = find_mount("/proc")
    assert root is not None and root.fstype == "proc"


def test_a_table_that_could_not_be_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that is empty nor one that is out of date passes for the kernel's, and nothing stays open."""
    table = _Table()
    here = os.open("/proc", os.O_PATH | os.O_CLOEXEC)  # a mount, in a chroot, too
    id = mount_id(here)
    os.close(here)

    class News:
        """A poll(2) that tells once that there is another table."""

        said = False

        def poll(self, _timeout: int) -> bool:
            was_said, self.said = self.said, True
            return not was_said

    def refuse(_line: bytes) -> Mount:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    for first in (True, False):
        if not first:
            table._mounts.clear()
            monkeypatch.setattr(table, "_poll", News())
        open_before = len(os.listdir("/proc/self/fd")) - (not first)
        with monkeypatch.context() as patch, raises_errno(errno.ENOMEM):
            patch.setattr(mounts, "parse_mount", refuse)
            table.find(id)
        assert len(os.listdir("/proc/self/fd")) == open_before
        found = table.find(id)
        assert found is not None and found.id == id
    os.close(table._fd)


def test_unmounting_what_is_none(tmp_path: Path) -> None:
    with raises_errno(errno.EINVAL, errno.EPERM):
        unmount(str(tmp_path))


def test_unmounting_what_is_in_use(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=True)
    try:
        with (tmp_path / "file").open("w"):
            with raises_errno(errno.EBUSY):
                unmount(str(tmp_path))
            assert find_mount(str(tmp_path)) is not None
            unmount(str(tmp_path), lazy=True)
            assert find_mount(str(tmp_path)) is None
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=False, capture_output=True)
