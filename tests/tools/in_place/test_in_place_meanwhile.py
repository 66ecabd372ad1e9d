"""A conversion was interrupted, and the file is another one when it is taken up again: then it is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qedfuse.chain.unfinished import SUFFIX, Journal, Step, read_journal
from qedfuse.tools.in_place.apply import InPlace
from tests.helpers.qemu.cli import one_line, qedfuse_inside, qemu_img

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


TO_QED, TO_RAW = ["-f", "raw", "-O", "qed"], ["-f", "qed", "-O", "raw"]
Change = Callable[[Path, bytes], None]


#: Of a QED image its tables tell what is in use, whatever has become of it since.
CASES = [(TO_QED, Step.TAIL, brought_back), (TO_QED, Step.TAIL, grown)]
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
