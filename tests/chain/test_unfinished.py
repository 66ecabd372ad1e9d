"""The journal of a conversion in place: what it holds, whoever wrote it, and what it keeps from happening."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from qedfuse.chain.opening import open_image
from qedfuse.chain.unfinished import SUFFIX, Journal, Step, Unfinished, UnfinishedError, journal_path, read_journal
from qedfuse.errors import FormatError
from tests.helpers.qemu.cli import new_image, one_line, qedfuse_inside, qemu_img

GOOD = Unfinished("raw", "qed", 4096, 8192, b"old" + bytes(509), b"QED\0" + bytes(508), Step.SWITCH)
EVERY = [replace(GOOD, step=Step.TAIL, new_first=None), GOOD, replace(GOOD, step=Step.FINISH)]


def journal_of(image: Path) -> Path:
    return image.with_name(image.name + SUFFIX)


def leave_journal(image: Path, unfinished: Unfinished = GOOD) -> None:
    Journal(str(journal_of(image)), 0o600).write(unfinished)


@pytest.mark.parametrize("unfinished", EVERY, ids=lambda unfinished: unfinished.step.value)
def test_it_is_read_as_it_was_written(tmp_path: Path, unfinished: Unfinished) -> None:
    path = tmp_path / "journal"
    journal = Journal(str(path), 0o640)
    assert journal.read() is None
    journal.write(EVERY[0])
    journal.write(unfinished)
    assert journal.read() == unfinished
    assert os.listdir(tmp_path) == ["journal"]
    assert path.stat().st_mode & 0o777 & ~0o640 == 0
    journal.remove()
    journal.remove()
    assert os.listdir(tmp_path) == []


def test_what_a_crash_has_left_is_replaced_and_removed(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal"), 0o600)
    (tmp_path / "journal.new").write_bytes(b"half of")
    assert journal.read() is None
    journal.write(GOOD)
    assert journal.read() == GOOD and os.listdir(tmp_path) == ["journal"]
    (tmp_path / "journal.new").write_bytes(b"half of")
    journal.remove()
    assert os.listdir(tmp_path) == []


def set_field(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        fields[name] = value

    return change


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": set_field("version", 2),
    "no version": lambda fields: fields.pop("version"),
    "one field more": set_field("more", 1),
    "one field less": lambda fields: fields.pop("old_size"),
    "unknown format": set_field("source", "vmdk"),
    "format is a list": set_field("source", ["raw"]),
    "same formats": set_field("source", "qed"),
    "unknown step": set_field("step", "done"),
    "no new sector": set_field("new_first", None),
    "short sector": set_field("old_first", "AAAA"),
    "no base64": set_field("new_first", "?" * 684),
    "sector is a number": set_field("old_first", 5),
    "size 0": set_field("old_size", 0),
    "negative size": set_field("old_size", -1),
    "huge size": set_field("old_size", 1 << 63),
    "size is true": set_field("old_size", True),
    "size is text": set_field("old_size", "4096"),
    "shorter than before": set_field("grown_size", 4095),
    "size is a fraction": set_field("old_size", 4096.0),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_one_wrong_field(change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(GOOD.encode())
    change(fields)
    with pytest.raises(FormatError, match="no valid journal"):
        Unfinished.decode(json.dumps(fields).encode(), "journal")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 512, b"[]", b"7", b'{"version": 1', b"\xff\xfe", b"[" * 100_000, b'{"version": NaN}', b" " * 99_999],
)
def test_no_journal_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="no valid journal") as caught:
        read_journal(str(path))
    assert len(str(caught.value)) < 400 + len(str(path))


def test_no_regular_file(tmp_path: Path) -> None:
    """Neither a FIFO, which would wait, nor a link to anywhere."""
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(tmp_path / "elsewhere")
    leave_journal(tmp_path / "elsewhere", GOOD)
    for path in (fifo, link, tmp_path):
        with pytest.raises(OSError):
            read_journal(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_one_of_a_stranger(tmp_path: Path) -> None:
    """In a directory that all may write to, it could have a part of the file cut off."""
    disk, user = tmp_path / "disk", 65534
    disk.write_bytes(bytes(1 << 20))
    leave_journal(disk, replace(EVERY[0], old_size=512, grown_size=2 << 20, old_first=bytes(512)))
    os.chown(journal_of(disk), user, -1)
    for undo in ([], ["--undo"]):
        done = qedfuse_inside("convert", "--in-place", "-f", "raw", "-O", "qed", *undo, disk)
        one_line(done, 1, f"{journal_of(disk)}: belongs to another user", f"{disk} is unchanged")
        assert disk.read_bytes() == bytes(1 << 20)
    os.chown(disk, user, -1)
    assert qedfuse_inside("convert", "--in-place", "--undo", disk).code == 0
    assert disk.stat().st_size == 512


def test_it_lies_beside_the_file_itself(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    image = new_image(inner / "disk.qed")
    link = tmp_path / "link.qed"
    link.symlink_to(image)
    with link.open("rb") as file:
        assert journal_path(file.fileno(), str(link)) == str(journal_of(image))


# -- what it keeps from happening --------------------------------------------------------------------------------------


@pytest.fixture(params=EVERY, ids=lambda unfinished: str(unfinished.step.value))
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An image with which a conversion is under way."""
    path = new_image(tmp_path / "disk.qed", fill=7)
    leave_journal(path, request.param)
    return path


def test_no_open_for_writing(image: Path) -> None:
    async def main(read_only: bool) -> None:
        async with open_image(image, read_only=read_only) as opened:
            assert await opened.read(0, 3) == b"\7\7\7"

    with pytest.raises(UnfinishedError, match="convert --in-place -f raw -O qed"):
        trio.run(main, False)
    trio.run(main, True)


def test_nothing_else_writes_to_it(image: Path) -> None:
    before = image.read_bytes()
    commands: list[tuple[object, ...]] = [
        ("check", "-r", "all", image),
        ("create", image, "1M"),
        ("compact", image),
        ("resize", "-f", "raw", image, "4M"),
        ("resize", image, "+4M"),
        ("rebase", "-u", "-b", "base", "-F", "raw", image),
        ("rebase", "-u", "-b", "", image),
        ("convert", "-O", "qed", image.parent / "other.raw", image),
        ("convert", image.parent / "other.raw", image),
    ]
    (image.parent / "other.raw").write_bytes(bytes(4096))
    for command in commands:
        one_line(
            qedfuse_inside(*map(str, command)),
            1,
            str(image),
            "conversion in place from raw to qed",
            "convert --in-place",
        )
    assert image.read_bytes() == before


def test_no_other_conversion(image: Path) -> None:
    before = image.read_bytes()
    for words in (["-O", "raw"], ["-f", "qcow2", "-O", "qed"], ["-O", "raw", "--undo"]):
        one_line(qedfuse_inside("convert", "--in-place", *words, image), 1, "from raw to qed", f"{image} is unchanged")
    assert image.read_bytes() == before


def test_who_looks_is_told(image: Path) -> None:
    told = qedfuse_inside("info", image)
    assert told.code == 0 and "unfinished: a conversion in place from raw to qed" in told.out
    told = qedfuse_inside("info", "--output=json", image)
    assert "from raw to qed" in json.loads(told.out)["unfinished-conversion"]
    told = qedfuse_inside("check", image)
    assert told.code == 0 and "from raw to qed" in told.out
    assert "from raw to qed" in json.loads(qedfuse_inside("check", "--output=json", image).out)["problems"][0]
    assert qedfuse_inside("map", image).code == 0


def test_who_looks_at_a_journal_that_is_none(image: Path) -> None:
    journal_of(image).write_bytes(b"{}")
    told = qedfuse_inside("info", image)
    assert told.code == 0 and "no valid journal" in told.out
    one_line(qedfuse_inside("check", "-r", "all", image), 1, SUFFIX, "no valid journal")
    one_line(qedfuse_inside("convert", "--in-place", image), 1, "no valid journal", f"{image} is unchanged")


def test_a_raw_disk_that_is_longer_than_it_should_be(tmp_path: Path) -> None:
    """It could not be told from its tail: neither a source nor a backing file."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(8192))
    qemu_img("create", "-q", "-f", "qed", "-b", disk, "-F", "raw", tmp_path / "over.qed")
    leave_journal(disk, EVERY[0])
    for words in (["info"], ["check"], ["convert", "-O", "qed"], ["convert", "-f", "raw"]):
        target = [tmp_path / "target"] if "convert" in words else []
        one_line(
            qedfuse_inside(*words, disk, *target), 1, f"{disk}: a conversion in place from raw to qed is under way"
        )
    one_line(qedfuse_inside("convert", tmp_path / "over.qed", tmp_path / "target"), 1, f"{disk}: a conversion in place")
    assert not (tmp_path / "target").exists()
