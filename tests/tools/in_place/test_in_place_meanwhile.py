"""A conversion was interrupted, and the file is another one when it is taken up again: then it is left alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qedfuse.chain.unfinished import SUFFIX, Journal, Step, read_journal
from qedfuse.tools.in_place.apply import InPlace
from tests.helpers.qemu.cli import new_image, one_line, qedfuse_inside, qemu_img, qemu_io

MIB = 1 << 20


class Interruption(BaseException):
    """The process has ended."""


def interrupted(path: Path, words: list[str], step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a conversion as SIGKILL would after its journal has come to say `step`."""
    write = Journal.write

    def writing(self: Journal, unfinished: object) -> None:
        write(self, unfinished)  # type: ignore[arg-type]
        if getattr(unfinished, "step", None) is step:
            raise Interruption

    async def leave(_self: InPlace, _conversion: object) -> None:
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", writing)
        patch.setattr(InPlace, "_retreat", leave)
        qedfuse_inside("convert", "--in-place", *words, path)
    found = read_journal(f"{path}{SUFFIX}")
    assert found is not None and found.step is step


def brought_back(path: Path, content: bytes) -> None:
    """Another disk, from a backup."""
    path.write_bytes(b"other" * 100 + content[500:])


def the_same_brought_back(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def grown(path: Path, _content: bytes) -> None:
    qemu_img("resize", "-q", "-f", "raw", path, "+9M")
    with path.open("r+b") as file:
        file.seek(-MIB, 2)
        file.write(b"more" * 1000)


def grown_a_little(path: Path, _content: bytes) -> None:
    """By less than the conversion was going to reserve."""
    with path.open("r+b") as file:
        file.seek(64 << 10, os.SEEK_END)
        file.write(b"more" * 1024)


TO_QED, TO_RAW = ["-f", "raw", "-O", "qed"], ["-f", "qed", "-O", "raw"]
Change = Callable[[Path, bytes], None]


#: Of a QED image its tables tell what is in use, whatever has become of it since.
CASES = [(TO_QED, Step.TAIL, brought_back), (TO_QED, Step.TAIL, grown), (TO_QED, Step.TAIL, grown_a_little)]
CASES += [
    (words, step, change)
    for words in (TO_QED, TO_RAW)
    for step, change in (
        (Step.SWITCH, brought_back),
        (Step.FINISH, brought_back),
        (Step.FINISH, the_same_brought_back),
    )
]


@pytest.mark.parametrize("undo", [[], ["--undo"]], ids=["finished", "undone"])
@pytest.mark.parametrize(("words", "step", "change"), CASES)
def test_it_is_left_alone(
    tmp_path: Path, words: list[str], step: Step, change: Change, undo: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"disk" * (MIB // 4))
    if words == TO_RAW:
        assert qedfuse_inside("convert", "--in-place", *TO_QED, path).code == 0
    content = path.read_bytes()
    interrupted(path, words, step, monkeypatch)
    change(path, content)
    before = path.read_bytes()
    done = qedfuse_inside("convert", "--in-place", *words, *undo, path)
    if step is Step.FINISH and undo:
        one_line(done, 1, "only finished (without --undo)")
    else:
        one_line(done, 1, "another program has changed the file", f"; {path} is unchanged\n")
    assert path.read_bytes() == before


@pytest.mark.parametrize("step", [Step.TAIL, Step.SWITCH])
@pytest.mark.parametrize("undo", [[], ["--undo"]], ids=["finished", "undone"])
def test_what_the_guest_has_written_is_kept(
    tmp_path: Path, step: Step, undo: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A raw disk was used again before the switch, but for its first sector."""
    path = tmp_path / "disk"
    path.write_bytes(b"disk" * (MIB // 4))
    interrupted(path, TO_QED, step, monkeypatch)
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"guest" * 1000)
        file.seek(MIB // 2)
        file.write(b"guest" * 1000)
    content = path.read_bytes()[:MIB]
    assert qedfuse_inside("convert", "--in-place", *TO_QED, *undo, path).code == 0
    if not undo:
        assert qedfuse_inside("convert", "--in-place", *TO_RAW, path).code == 0
    assert path.read_bytes() == content


def switched(path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a conversion as SIGKILL would just after its switch."""

    async def end(*_arguments: object) -> None:
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(InPlace, "_finish", end)
        qedfuse_inside("convert", "--in-place", *words, path)
    found = read_journal(f"{path}{SUFFIX}")
    assert found is not None and path.read_bytes()[:512] == found.new_first != found.old_first


def raw_disk(path: Path) -> None:
    path.write_bytes(b"disk" * (MIB // 4) + bytes(MIB))


def qed_image(path: Path) -> None:
    raw_disk(path)
    assert qedfuse_inside("convert", "--in-place", *TO_QED, path).code == 0


def qed_image_of_any_order(path: Path) -> None:
    new_image(path, "2M")
    qemu_io(path, "write -P 4 1M 192k", "write -P 5 64k 128k", "write -P 6 0 1k")


def qcow2_image(path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", path, "2M")
    qemu_io(path, "write -P 4 0 192k", "write -c -P 5 256k 64k", format="qcow2")


FROM_QCOW2 = ["-f", "qcow2", "-O", "qed"]
WAYS = [(TO_QED, raw_disk), (TO_RAW, qed_image), (TO_RAW, qed_image_of_any_order), (FROM_QCOW2, qcow2_image)]


@pytest.mark.parametrize("command", ["read 0 1k", "write -P 9 512 1k", "write -z 64k 64k", "write -P 9 1600k 4k"])
@pytest.mark.parametrize(("words", "make"), WAYS)
def test_what_was_written_to_the_new_image_is_not_lost(
    tmp_path: Path, words: list[str], make: Callable[[Path], None], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU knows no journal. Where the old image lacks what it has written, the new one stays."""
    path, judge = tmp_path / "disk", tmp_path / "judge"
    _, source, _, target = words
    make(path)
    switched(path, words, monkeypatch)
    qemu_io(path, command, format=target)
    used = path.read_bytes()
    qemu_img("convert", "-f", target, "-O", "raw", path, judge)
    os.truncate(judge, 2 * MIB)
    done = qedfuse_inside("convert", "--in-place", *words, "--undo", path)
    if done.code == 0:
        qemu_img("check", "-q", "-f", source, path, status=(0, 3, 63))  # moves leave leaks; raw has no check
        qemu_img("compare", "-q", "-f", "raw", "-F", source, judge, path)
        return
    assert not command.startswith("read")
    one_line(done, 1, "was used since", "only finished (without --undo)")
    assert path.read_bytes() == used
    assert qedfuse_inside("convert", "--in-place", *words, path).code == 0
    qemu_img("compare", "-q", "-f", "raw", "-F", target, judge, path)


@pytest.mark.parametrize(("words", "make"), WAYS)
def test_a_new_disk_that_has_grown(
    tmp_path: Path, words: list[str], make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    make(path)
    switched(path, words, monkeypatch)
    qemu_img("resize", "-q", "-f", words[-1], path, "+1M")
    before = path.read_bytes()
    for undo in ([], ["--undo"]):
        assert qedfuse_inside("convert", "--in-place", *words, *undo, path).code == 1
        assert path.read_bytes() == before


def test_another_disk_that_begins_with_zeroes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal of a conversion to raw tells such a disk from its own by the size."""
    path = tmp_path / "disk"
    new_image(path, "2M")
    switched(path, TO_RAW, monkeypatch)
    path.write_bytes(bytes(4 * MIB) + b"another" * 1000)
    before = path.read_bytes()
    for undo in ([], ["--undo"]):
        assert qedfuse_inside("convert", "--in-place", *TO_RAW, *undo, path).code == 1
        assert path.read_bytes() == before
