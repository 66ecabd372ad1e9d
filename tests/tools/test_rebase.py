"""`qedfuse rebase`: the image reads the same over another backing file, and QEMU agrees.

What a crash leaves is in tests/system/crash/test_crash_rebase.py, and a SIGKILL in tests/system/kill.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings

from qedfuse.cli.main import main
from qedfuse.layers.layer import Layer
from qedfuse.qed.image import Image
from qedfuse.tools import rebase as rebasing
from qedfuse.tools.rebase import rebase_image
from tests.helpers.images.conversions import MIB, usage
from tests.helpers.images.overlays import KIB, Shape, content, copied, shapes
from tests.helpers.mounts.mounts import mounted, need_fuse
from tests.helpers.qemu.cli import (
    TIMEOUT,
    Result,
    environment,
    new_image,
    one_line,
    qedfuse,
    qemu_has_open,
    qemu_img,
    qemu_io,
)

CLUSTER = 64 * KIB


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: object) -> Result:
    """In this process, which takes less time."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["rebase", *map(str, words)])
    return Result(code, out.getvalue(), err.getvalue())


def rebase(*words: object) -> None:
    assert main(["rebase", *map(str, words)]) == 0


def backing_of(image: Path) -> tuple[str | None, str | None]:
    """The name that QEMU finds, and whether it must not be probed."""
    info = json.loads(qemu_img("info", "-f", "qed", "--output=json", image))
    return info.get("backing-filename"), info.get("backing-filename-format")


def raw(name: str, *parts: tuple[bytes, int]) -> Path:
    """A raw file of runs of one byte; zeroes are holes."""
    path = Path(name)
    with path.open("wb") as file:
        for byte, size in parts:
            if byte == b"\0":
                file.seek(size, os.SEEK_CUR)
            else:
                file.write(byte * size)
        file.truncate()
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """1 MiB over 512 KiB of a raw file, with data, zeroes and nothing of its own."""
    raw("old.raw", (b"a", 128 * KIB), (b"\0", 128 * KIB), (b"a", 256 * KIB))
    path = new_image(tmp_path / "image.qed", "1M", "-b", "old.raw", "-F", "raw")
    qemu_io(path, "write -P 0x55 64k 64k", "write -z 384k 64k", "write -P 0x66 900k 512")
    return path


# -- it reads the same ------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(shapes(top="qed"), shapes())
def test_any_chains(old: Shape, new: Shape) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        image, below = old.make(directory / "old"), new.make(directory / "new")
        theirs = copied(image.parent) / image.name
        before, unchanged = content(image), content(below)
        words = ("-f", "qed", "-b", f"../new/{below.name}", "-F", below.suffix[1:])
        rebase(*words, image)
        assert content(image) == before
        assert content(below) == unchanged
        qemu_img("rebase", *words, theirs)
        assert backing_of(image) == backing_of(theirs)
        if content(theirs) == before:  # 7.2's goes wrong where backing files are short
            assert usage(image) <= usage(theirs)
        rebase("-f", "qed", "-b", "", image)
        shutil.rmtree(below.parent)
        assert content(image) == before
        assert backing_of(image) == (None, None)


@settings(max_examples=6, deadline=None)
@given(shapes(bottom=("qed",), most=1), shapes())
def test_a_first_one(alone: Shape, new: Shape) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        image, below = alone.make(directory / "alone"), new.make(directory / "new")
        before = content(image)
        rebase("-b", below, "-F", below.suffix[1:], image)
        assert content(image) == before
        assert backing_of(image)[0] == str(below)


@pytest.mark.parametrize("size", [0, 100 * KIB + 512, 512 * KIB, MIB, 3 * MIB])
def test_stale_data_does_not_show(image: Path, size: int) -> None:
    """Nor does anything go that the old one had, wherever the new one ends."""
    before = content(image)
    rebase("-b", raw("new.raw", (b"n", size)), "-F", "raw", image)
    assert content(image) == before
    assert backing_of(image) == ("new.raw", "raw")


def test_zeroes_take_no_space(image: Path) -> None:
    """What reads as zeroes gets entries that say so."""
    new = raw("new.raw", (b"a", 128 * KIB), (b"n", 128 * KIB), (b"a", 256 * KIB), (b"n", 512 * KIB))
    before, took = content(image), usage(image)
    rebase("-b", new, image)
    assert content(image) == before
    assert usage(image) == took


def test_large_clusters(tmp_path: Path) -> None:
    """Larger than what is compared at a time."""
    raw("old.raw", (b"a", 4 * MIB), (b"\0", 4 * MIB))
    raw("new.raw", (b"a", 3 * MIB), (b"b", MIB), (b"\0", 3 * MIB), (b"b", MIB))
    options = ["-o", "cluster_size=4M,table_size=2"]
    image = new_image(tmp_path / "image.qed", "9M", *options, "-b", "old.raw", "-F", "raw")
    before, took = content(image), usage(image)
    rebase("-b", "new.raw", image)
    assert content(image) == before
    rebase("-b", "", image)
    assert content(image) == before
    assert usage(image) - took < 5 * MIB  # one of data, and one that says zeroes


class TestSameBytes:
    """What is the same by its place is neither read nor copied."""

    @pytest.fixture(autouse=True)
    def compared(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
        ranges: list[tuple[int, int]] = []
        original = rebasing._copy_step

        async def noted(image: Image, layer: Layer | None, start: int, end: int) -> None:
            ranges.append((start, end))
            await original(image, layer, start, end)

        monkeypatch.setattr(rebasing, "_copy_step", noted)
        return ranges

    def test_down(self, tmp_path: Path, compared: list[tuple[int, int]]) -> None:
        """An image in the middle goes: only what it has is compared."""
        raw("base.raw", (b"a", MIB))
        middle = new_image(tmp_path / "middle.qed", "1M", "-b", "base.raw", "-F", "raw")
        qemu_io(middle, "write -P 1 128k 64k")
        image = new_image(tmp_path / "image.qed", "1M", "-b", middle, "-F", "qed")
        qemu_io(image, "write -P 2 640k 64k")
        before = content(image)
        rebase("-b", "base.raw", "-F", "raw", image)
        assert compared == [(128 * KIB, 192 * KIB)]
        assert content(image) == before

    def test_a_sibling(self, tmp_path: Path, compared: list[tuple[int, int]]) -> None:
        """Another overlay of the same base, by another name."""
        raw("base.raw", (b"a", MIB))
        os.link("base.raw", "link.raw")
        image = new_image(tmp_path / "image.qed", "1M", "-b", "base.raw", "-F", "raw")
        sibling = new_image(tmp_path / "sibling.qed", "1M", "-b", "link.raw", "-F", "raw")
        qemu_io(sibling, "write -P 1 128k 64k")
        before = content(image)
        rebase("-b", sibling, "-F", "qed", image)
        assert compared == [(128 * KIB, 192 * KIB)]
        assert content(image) == before

    def test_nothing(self, image: Path, compared: list[tuple[int, int]]) -> None:
        before = image.read_bytes()
        rebase("-b", "old.raw", "-F", "raw", image)
        assert compared == []
        after = image.read_bytes()
        assert after[512:] == before[512:]
        assert backing_of(image) == ("old.raw", "raw")


# -- names and options ------------------------------------------------------------------------------------------------


def test_a_name_is_relative_to_the_image(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(image)
    raw("new.raw", (b"n", MIB))
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    rebase("-b", "new.raw", "-F", "raw", "../image.qed")
    assert backing_of(image) == ("new.raw", "raw")
    assert content(image) == before


@pytest.mark.parametrize("format", ["raw", "qed", "qcow2"])
def test_the_format_is_probed_once(image: Path, tmp_path: Path, format: str) -> None:
    before = content(image)
    raw("flat", (b"n", MIB))
    qemu_img("convert", "-f", "raw", "-O", format, "flat", "new")
    rebase("-b", "new", image)
    assert backing_of(image) == ("new", "raw" if format == "raw" else None)
    assert content(image) == before


@pytest.mark.parametrize("format", ["raw", "qed", "qcow2"])
@pytest.mark.parametrize("name", ["nothing", "old.raw", "n" * 300, ""])
def test_unsafe_changes_the_header_as_qemu_does(image: Path, format: str, name: str) -> None:
    shutil.copy(image, "theirs.qed")
    words = ("-u", "-f", "qed", "-b", name, "-F", format)
    rebase(*words, image)
    qemu_img("rebase", *words, "theirs.qed")
    ours, theirs = image.read_bytes(), Path("theirs.qed").read_bytes()
    assert (
        backing_of(image)
        == backing_of(Path("theirs.qed"))
        == (name or None, "raw" if name and format == "raw" else None)
    )
    assert ours[:56] == theirs[:56]
    assert ours[512:] == theirs[512:]


def test_unsafe_without_a_name(image: Path) -> None:
    """As in qemu-img: none any more."""
    rebase("-u", image)
    assert backing_of(image) == (None, None)


def test_progress_and_hints(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rebase("-p", "-t", "none", "-T", "none", "-b", "", image)
    out = capsys.readouterr().out
    assert "(100.00/100%)" in out
    rebase("-p", "-q", "-b", "old.raw", image)
    assert capsys.readouterr() == ("", "")


def test_force_share_reads_what_is_in_use(image: Path, tmp_path: Path) -> None:
    before = content(image)
    new = new_image(tmp_path / "new.qed", "1M", fill=1)
    with qemu_has_open(new):
        one_line(run("-b", "new.qed", image), 1, "new.qed", "is in use by another process")
        assert qedfuse("rebase", "-U", "-b", "new.qed", image).code == 0
    assert content(image) == before


# -- refused ----------------------------------------------------------------------------------------------------------


def refused(image: Path, code: int, words: tuple[object, ...], *parts: str) -> None:
    before = image.read_bytes()
    one_line(run(*words, image), code, *parts)
    assert image.read_bytes() == before


def test_refusals(image: Path, tmp_path: Path) -> None:
    (tmp_path / "link.qed").hardlink_to(image)
    (tmp_path / "symbolic.qed").symlink_to(image)
    new_image(tmp_path / "over.qed", "1M", "-b", "symbolic.qed", "-F", "qed")
    (tmp_path / "broken.qed").write_bytes(b"QED\0")
    for name in ("image.qed", "link.qed", "symbolic.qed", "over.qed"):
        refused(image, 1, ("-b", name), "is part of this chain already (a loop)")
        refused(image, 1, ("-u", "-b", name, "-F", "qed"), "is part of this chain already (a loop)")
    refused(image, 1, ("-b", "missing.raw"), "image.qed", "missing.raw", "no such file")
    refused(image, 1, ("-b", "broken.qed"), "broken.qed", "the header is cut off")
    refused(image, 1, ("-b", "old.raw", "-F", "qed"), "old.raw: not a qed image")
    refused(image, 1, ("-b", "n" * 4096), "the header has room for")
    refused(image, 1, ("-u", "-b", "n" * 4096, "-F", "raw"), "the header has room for")
    refused(image, 1, ("-b", "nbd://host/disk"), "only files are supported")
    refused(image, 1, ("-b", "."), "a directory")
    refused(image, 2, (), "-b NEW is needed")
    refused(image, 2, ("-u", "-b", "new"), "it needs NEW's format (-F)")
    refused(image, 2, ("-b", "old.raw", "-F", "vmdk"), "'vmdk' is not one of")
    refused(image, 1, ("--no-backing", "-b", "old.raw"), "--no-backing")
    os.unlink("old.raw")
    refused(image, 1, ("-b", ""), f"image.qed: cannot open its backing file {tmp_path}/old.raw: no such file")
    one_line(run("-b", "", "missing.qed"), 1, "missing.qed: no such file or directory")
    raw("disk.raw", (b"x", MIB))
    one_line(run("-b", "", "disk.raw"), 1, "disk.raw: not a qed image")


def test_in_use(image: Path, tmp_path: Path) -> None:
    """By QEMU, or as anybody's backing file."""
    with qemu_has_open(image):
        for words in (("-b", ""), ("-u", "-b", "x", "-F", "raw")):
            refused(image, 1, words, "image.qed: is in use by another process (qemu-io, pid")
    over = new_image(tmp_path / "over.qed", "1M", "-b", "image.qed", "-F", "qed")
    with qemu_has_open(over):
        refused(image, 1, ("-b", ""), "image.qed: is in use by another process")


def test_mounted(image: Path, tmp_path: Path) -> None:
    need_fuse()
    point = tmp_path / "disk"
    point.touch()
    with mounted(image, point):
        for words in (("-b", ""), ("-u", "-b", "x", "-F", "raw")):
            one_line(run(*words, image), 1, f"image.qed: is mounted on {point}", f"qedfuse umount {point}")


# -- interrupted ------------------------------------------------------------------------------------------------------


async def cancelled_after(checkpoints: int, image: Path, new: str) -> bool:
    """Whether it was cancelled before it had done its work."""

    async def count_down() -> None:
        for _ in range(checkpoints):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()

    done = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_down)
        await rebase_image(str(image), new)
        done = True
        nursery.cancel_scope.cancel()
    return not done


@pytest.mark.parametrize("new", ["new.raw", ""])
def test_cancelled_anywhere(image: Path, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads as before, over the old one or the new one, and a second rebase finishes it."""
    monkeypatch.setattr(rebasing, "_STEP", CLUSTER)
    raw("new.raw", (b"n", 2 * MIB))
    before, start = content(image), image.read_bytes()
    checkpoints = 0
    names = set()
    while trio.run(partial(cancelled_after, checkpoints, image, new)):
        assert content(image) == before
        names.add(backing_of(image)[0])
        if checkpoints % 3 == 0:
            rebase("-b", new, image)
            assert content(image) == before
            image.write_bytes(start)
        checkpoints += 1 + checkpoints // 8
    assert "old.raw" in names
    assert checkpoints > 3


def test_a_signal_ends_it(image: Path, tmp_path: Path) -> None:
    """As a shell has it: 128 and the signal's number."""
    raw("new.raw", (b"n", 2 * MIB))
    before = content(image)
    code = (
        "import os, signal, sys, trio\n"
        "from qedfuse.cli.main import main\n"
        "from qedfuse.tools import rebase\n"
        "async def step(*words):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    await trio.sleep_forever()\n"
        "rebase._copy_step = step\n"
        f"sys.exit(main(['rebase', '-b', 'new.raw', {str(image)!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + 15, "", "")
    assert content(image) == before
    assert backing_of(image) == ("old.raw", "raw")
