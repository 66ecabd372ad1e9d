"""Where the reason for an EIO is found: in the log, or the want of one is told, and in `status`; and who hides whom."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qedfuse.errors import FormatError
from qedfuse.fuse.complaints import Unopened
from tests.helpers.mounts.mounts import EXTRA_OPTIONS, cleaned_up, mounted, need_fuse, wait_until
from tests.helpers.qemu.cli import Result, new_image, qedfuse


def status(point: Path) -> dict[str, Any]:
    result = qedfuse("status", "--output=json", point)
    assert result.code == 0, result
    found = json.loads(result.out)
    assert isinstance(found, dict)
    return found


def test_a_mount_without_a_log_says_so(source: Path, point: Path) -> None:
    need_fuse()
    new_image(source / "a.qed")
    if os.path.exists("/dev/log"):
        pytest.skip("there is a /dev/log here")
    with cleaned_up(point):
        result = qedfuse("mount", *EXTRA_OPTIONS, source, point)
        assert qedfuse("umount", point).code == 0
    assert result.code == 0
    assert result.out == ""
    assert result.err == "qedfuse mount: mounted, but there is nowhere to log to (no /dev/log): use --log-file\n"


def test_with_a_log_there_is_nothing_to_say(source: Path, point: Path, tmp_path: Path) -> None:
    need_fuse()
    log = tmp_path / "log"
    with cleaned_up(point):
        assert qedfuse("mount", *EXTRA_OPTIONS, "--log-file", log, source, point) == Result(0, "", "")
        assert qedfuse("umount", point) == Result(0, "", "")


def test_what_cannot_be_opened_is_in_the_status(source: Path, point: Path) -> None:
    good, bad = new_image(source / "good.qed"), new_image(source / "bad.qed")
    with bad.open("r+b") as file:
        file.write(b"\xff" * 64)
    with mounted(source, point):
        assert status(point)["unopened-images"] == []
        assert len((point / "good.raw").read_bytes()) == 1 << 20
        with pytest.raises(OSError, match="Input/output"):
            (point / "bad.raw").read_bytes()
        (found,) = status(point)["unopened-images"]
        assert found["filename"] == str(bad)
        assert "not a qed image" in found["error"]
        assert f"not opened: {bad}: not a qed image" in qedfuse("status", point).out
        bad.write_bytes(good.read_bytes())  # mended
        wait_until(lambda: (point / "bad.raw").stat().st_size == 1 << 20)
        assert len((point / "bad.raw").read_bytes()) == 1 << 20
        assert status(point)["unopened-images"] == []


def test_of_two_with_one_name_it_is_told_which_is_shown(source: Path, point: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    first, other = new_image(source / "a.qed"), new_image(second / "a.qed")
    new_image(second / "b.qed")
    os.link(first, second / "same.qed")
    (source / "same.qed").symlink_to(second / "same.qed")  # the same image twice is no loss
    with mounted(source, second, point) as mount:
        wait_until(lambda: "not shown" in mount.text())
        assert f"{other}: not shown, since {first} has its name in an earlier source" in mount.text()
        assert status(point)["hidden-images"] == [{"filename": str(other), "hidden-by": str(first)}]
        assert f"not shown: {other}, hidden by {first}" in qedfuse("status", point).out
        first.unlink()
        (source / "same.qed").unlink()
        wait_until(lambda: sorted(os.listdir(point)) == ["a.raw", "b.raw", "same.raw"])
        assert status(point)["hidden-images"] == []
        assert mount.text().count("not shown") == 1


def test_an_image_of_the_command_line_hides_others(source: Path, point: Path, tmp_path: Path) -> None:
    shown, hidden = new_image(tmp_path / "a.qed"), new_image(source / "a.qed")
    with mounted(shown, source, point):
        wait_until(lambda: status(point)["hidden-images"] != [])
        assert status(point)["hidden-images"] == [{"filename": str(hidden), "hidden-by": str(shown)}]


def test_the_list_of_what_cannot_be_opened_is_bounded() -> None:
    unopened = Unopened()
    names = [f"/x/{number}" for number in range(1000)]
    for name in names:
        unopened.note(name, FormatError(name, "not a qed image"))
    assert [item["filename"] for item in unopened.status(names)] == names[-100:]
    unopened.forget(names[-1])
    assert len(unopened.status(names)) == 99
    assert unopened.status([names[-2]]) == [{"filename": names[-2], "error": f"{names[-2]}: not a qed image"}]
