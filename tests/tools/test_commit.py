"""`qedfuse commit`: what an overlay has goes into its base, the overlay reads the same and is empty, and QEMU agrees.

What a crash leaves is in tests/system/crash/test_crash_commit.py, and a SIGKILL in tests/system/kill.
"""

from __future__ import annotations

import errno
import io
import os
import subprocess
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings

from qedfuse import open_image
from qedfuse.cli.main import main
from qedfuse.host.file_storage import FileStorage
from qedfuse.qed.header import Header
from qedfuse.tools import commit as committing
from qedfuse.tools.commit import commit_image
from tests.helpers.images.chains import header_of
from tests.helpers.images.conversions import MIB, flat, usage
from tests.helpers.images.devices import device_with
from tests.helpers.images.overlays import KIB, Shape, content, copied, shapes
from tests.helpers.mounts.guests import filesystem, need_guest, qemu_check
from tests.helpers.mounts.mounts import mounted, need_fuse
from tests.helpers.qemu.cli import Result, new_image, one_line, qedfuse, qemu_has_open, qemu_img, qemu_io


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    return capsys


def run(*words: object) -> Result:
    """In this process, which takes less time."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["commit", *map(str, words)])
    return Result(code, out.getvalue(), err.getvalue())


def commit(*words: object) -> None:
    assert main(["commit", "-q", *map(str, words)]) == 0


def assert_empty(image: Path) -> None:
    header: Header = header_of(image)
    assert header.l1_table_offset == header.header_bytes
    assert image.stat().st_size == header.header_bytes + header.geometry.table_bytes
    assert usage(image) <= max(4096, header.header_bytes)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """1 MiB over 640 KiB of a raw file, with data, zeroes and nothing of its own."""
    (tmp_path / "base.raw").write_bytes(b"b" * 640 * KIB)
    path = new_image(tmp_path / "image.qed", "1M", "-b", "base.raw", "-F", "raw")
    qemu_io(path, "write -P 0x55 64k 64k", "write -z 256k 64k", "write -P 0x66 900k 512", "write -P 0 512k 4k")
    return path


# -- it reads the same ------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(shapes(top="qed", most=2))
def test_any_chains(shape: Shape) -> None:
    """The base becomes what QEMU makes of it."""
    with tempfile.TemporaryDirectory() as name:
        image = shape.make(Path(name) / "images")
        format = shape.layers[-2][0]
        base = image.with_name(f"{len(shape.layers) - 2}.{format}")
        before = content(image)
        if format == "qcow2":
            one_line(run(image), 1, f"{base}: is qcow2, which qedfuse does not write")
            return
        theirs = copied(image.parent)
        lower = [image.with_name(f"{number}.{kind}") for number, (kind, _) in enumerate(shape.layers[:-2])]
        untouched = [path.read_bytes() for path in lower]
        header = header_of(image)
        commit(image)
        assert content(image) == before
        assert_empty(image)
        assert header_of(image) == header
        assert untouched == [path.read_bytes() for path in lower]
        assert content(base)[: len(before)] == before
        grows = shape.layers[-2][1] < shape.layers[-1][1]
        if format == "qed" and grows and len(shape.layers) > 2:  # QEMU grows none that has a backing file
            return
        qemu_img("commit", "-q", "-f", "qed", theirs / image.name)
        assert content(base) == content(theirs / base.name)
        assert base.stat().st_size == (theirs / base.name).stat().st_size or format == "qed"


@settings(max_examples=8, deadline=None)
@given(shapes(bottom=("raw", "qed"), top="qed", most=3))
def test_down_to_the_last(shape: Shape) -> None:
    """With -b: over all layers between, which are kept, as the overlay is."""
    with tempfile.TemporaryDirectory() as name:
        image = shape.make(Path(name) / "images")
        base = image.with_name(f"0.{shape.layers[0][0]}")
        theirs = copied(image.parent)
        before, kept = content(image), image.read_bytes()
        commit("-b", base, image)
        assert content(image) == before
        assert image.read_bytes() == kept
        assert content(base)[: len(before)] == before
        qemu_img("commit", "-q", "-f", "qed", "-b", base.name, theirs / image.name, cwd=theirs)
        assert len(content(base)) == len(content(theirs / base.name))


def test_zeroes_are_holes(image: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    before = content(image)
    commit(image)
    assert base.read_bytes() == before
    # 640 KiB without the zeroes of 64 and 4 KiB, and of the cluster at 900 KiB a page
    assert usage(base) == (640 - 64 - 4 + 4) * KIB
    commit(image)
    assert base.read_bytes() == before


def test_d_keeps_the_overlay(image: Path, tmp_path: Path) -> None:
    before, kept = content(image), image.read_bytes()
    commit("-d", image)
    assert image.read_bytes() == kept
    assert (tmp_path / "base.raw").read_bytes() == before


def test_a_longer_base_keeps_its_end(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * 2 * MIB)
    image = new_image(tmp_path / "image.qed", "1M", "-b", "base.raw", "-F", "raw", fill=7)
    before = content(image)
    commit(image)
    assert (tmp_path / "base.raw").read_bytes() == before + b"b" * MIB


def test_a_base_of_an_odd_size(tmp_path: Path) -> None:
    """The rest of its last sector counts as there."""
    (tmp_path / "base.raw").write_bytes(b"b" * 100_001)
    image = new_image(tmp_path / "image.qed", str(100_352), "-b", "base.raw", "-F", "raw")

    async def write() -> None:
        async with open_image(image) as opened:  # QEMU cannot copy up such an end
            await opened.write(99 * KIB - 512, b"7" * 512)

    trio.run(write)
    before = content(image)
    commit(image)
    assert content(image) == before
    assert (tmp_path / "base.raw").read_bytes() == before


def test_a_qed_base_over_a_longer_one(tmp_path: Path) -> None:
    """When it grows, what it has below it does not show."""
    (tmp_path / "below.raw").write_bytes(b"x" * 2 * MIB)
    base = new_image(tmp_path / "base.qed", "512k", "-b", "below.raw", "-F", "raw")
    image = new_image(tmp_path / "image.qed", "1M", "-b", "base.qed", "-F", "qed", fill=7)
    before = content(image)
    assert before[600 * KIB :] == bytes(424 * KIB)
    commit(image)
    assert content(image) == content(base) == before
    assert_empty(image)


def test_a_layer_between_that_is_short(tmp_path: Path) -> None:
    """What it hides of the base by its end is zeroes then."""
    (tmp_path / "base.raw").write_bytes(b"b" * MIB)
    new_image(tmp_path / "middle.qed", "256k", "-b", "base.raw", "-F", "raw")
    image = new_image(tmp_path / "image.qed", "1M", "-b", "middle.qed", "-F", "qed", fill=7)
    before = content(image)
    commit("-b", "base.raw", image)
    assert content(image) == before
    assert (tmp_path / "base.raw").read_bytes() == before


def test_on_block_devices(tmp_path: Path) -> None:
    """Both files: neither gets longer."""
    need_guest()
    (tmp_path / "base.raw").write_bytes(b"b" * MIB)
    image = new_image(tmp_path / "image.qed", "1M", "-b", tmp_path / "base.raw", "-F", "raw", fill=7)
    before = content(image)
    with device_with(tmp_path / "base.raw", MIB) as base:
        qemu_img("rebase", "-u", "-b", base, "-F", "raw", image)
        with device_with(image, 4 * MIB) as device:
            assert qedfuse("commit", device).code == 0
            assert base.read_bytes() == before
            assert qemu_check(device).get("corruptions", 0) == 0  # it takes the free rest of a device for leaks
            assert content_of_device(device) == before
            assert usage_of(device) == []
        qemu_img("resize", "-f", "qed", image, "2M")
        one_line(run(image), 1, f"{base}: is a block device of {MIB} bytes")


def content_of_device(device: Path) -> bytes:
    flat = Path("device.flat")
    qemu_img("convert", "-f", "qed", "-O", "raw", device, flat)
    return flat.read_bytes()


def usage_of(device: Path) -> list[str]:
    """The lines of `qemu-img map` that lead into the image itself."""
    return [line for line in qemu_img("map", "-f", "qed", device).splitlines() if line.endswith(str(device))]


# -- words ------------------------------------------------------------------------------------------------------------


def test_words(image: Path, said: pytest.CaptureFixture[str]) -> None:
    assert main(["commit", "-d", str(image)]) == 0
    assert said.readouterr() == ("Image committed.\n", "")
    assert main(["commit", "-d", "-q", "-p", "-t", "none", str(image)]) == 0
    assert said.readouterr() == ("", "")
    assert main(["commit", "-p", str(image)]) == 0
    out = said.readouterr().out
    assert "(100.00/100%)" in out and out.endswith("\nImage committed.\n")


@pytest.mark.parametrize("name", ["base.raw", "./base.raw", "link.raw", "/base.raw"])
def test_names_of_the_base(image: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here, or as the image has it."""
    (tmp_path / "link.raw").symlink_to("base.raw")
    before = content(image)
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    commit("-b", str(tmp_path) + name if name[0] == "/" else name, "../image.qed")
    assert (tmp_path / "base.raw").read_bytes() == before


# -- refused ----------------------------------------------------------------------------------------------------------


def refused(image: Path, code: int, words: tuple[object, ...], *parts: str) -> None:
    base = image.with_name("base.raw")
    before = image.read_bytes(), base.exists() and base.read_bytes()
    one_line(run(*words, image), code, *parts)
    assert (image.read_bytes(), base.exists() and base.read_bytes()) == before


def test_refusals(image: Path, tmp_path: Path) -> None:
    alone = new_image(tmp_path / "alone.qed", "1M")
    refused(alone, 1, (), "alone.qed: does not have a backing file")
    refused(alone, 1, ("-b", "base.raw"), "alone.qed: does not have a backing file")
    refused(image, 1, ("-b", "other.raw"), "image.qed: did not find other.raw in its backing chain")
    refused(image, 1, ("-b", "image.qed"), "image.qed: did not find image.qed in its backing chain")
    refused(image, 1, ("--no-backing",), "--no-backing")
    refused(image, 2, ("-f", "raw"), "'raw' is not 'qed'")
    (tmp_path / "base.raw").rename(tmp_path / "away")
    refused(image, 1, (), f"image.qed: cannot open its backing file {tmp_path}/base.raw: no such file")
    one_line(run("missing.qed"), 1, "missing.qed: no such file or directory")
    one_line(run("away"), 1, "away: not a qed image")


def test_a_base_that_cannot_be_so_large(tmp_path: Path) -> None:
    """For its geometry."""
    options = ["-o", "cluster_size=4k,table_size=2"]
    new_image(tmp_path / "base.raw", "1M", *options)
    image = new_image(tmp_path / "image.qed", "20G", "-b", "base.raw", "-F", "qed")
    refused(image, 1, (), "base.raw: file too large: this geometry maps at most 4294967296 bytes")


def test_in_use(image: Path, tmp_path: Path) -> None:
    with qemu_has_open(image):
        refused(image, 1, (), "image.qed: is in use by another process")
    sibling = new_image(tmp_path / "sibling.qed", "1M", "-b", "base.raw", "-F", "raw")
    point = tmp_path / "point"
    point.touch()
    need_fuse()
    with mounted(sibling, point):
        refused(image, 1, (), f"base.raw: is the backing file of an image that is mounted on {point}")
    with mounted(image, point):
        refused(image, 1, (), f"image.qed: is mounted on {point}", f"qedfuse umount {point}")
    base = new_image(tmp_path / "base.qed", "1M")
    over = new_image(tmp_path / "over.qed", "1M", "-b", "base.qed", "-F", "qed", fill=7)
    sibling = new_image(tmp_path / "sibling2.qed", "1M", "-b", "base.qed", "-F", "qed")
    before = base.read_bytes()
    with qemu_has_open(sibling):
        one_line(run(over), 1, "base.qed: is in use by another process (qemu-io, pid")
    assert base.read_bytes() == before


def test_a_read_only_host(image: Path, tmp_path: Path) -> None:
    need_guest()
    with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs") as host:
        base = host / "base.raw"
        base.write_bytes(b"b" * MIB)
        qemu_img("rebase", "-u", "-b", base, "-F", "raw", image)
        copy = host / "image.qed"
        copy.write_bytes(image.read_bytes())
        subprocess.run(["mount", "-o", "remount,ro", str(host)], check=True)
        refused(image, 1, (), f"{base}: read-only file system")
        refused(copy, 1, (), f"{copy}: read-only file system")
        one_line(qedfuse("rebase", "-b", "", copy), 1, f"{copy}: read-only file system")


# -- interrupted ------------------------------------------------------------------------------------------------------


async def cancelled_after(checkpoints: int, image: Path) -> bool:
    """Whether it was cancelled before it had done its work."""

    async def count_down() -> None:
        for _ in range(checkpoints):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()

    done = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_down)
        await commit_image(str(image))
        done = True
        nursery.cancel_scope.cancel()
    return not done


@pytest.mark.parametrize("format", ["raw", "qed"])
def test_cancelled_anywhere(image: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "_STEP", 16 * KIB)
    base = tmp_path / "base.raw"
    if format == "qed":
        base = tmp_path / "base.qed"
        qemu_img("convert", "-f", "raw", "-O", "qed", "-o", "cluster_size=4k,table_size=2", "base.raw", base)
        qemu_img("rebase", "-u", "-b", "base.qed", "-F", "qed", image)
    before, start = content(image), image.read_bytes()
    checkpoints = 0
    while trio.run(partial(cancelled_after, checkpoints, image)):
        assert content(image) == before
        checkpoints += 1 + checkpoints // 8
        if checkpoints % 3 == 0:
            commit(image)
            assert content(image) == content(base) == before
            image.write_bytes(start)
    assert checkpoints > 10


@pytest.mark.parametrize("where", ["base.raw", "image.qed"])
@pytest.mark.parametrize("name", ["write", "punch", "truncate", "sync"])
def test_a_host_that_fails(image: Path, tmp_path: Path, where: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The overlay reads as before, and a second commit finishes the work."""
    if (where, name) == ("image.qed", "write"):
        moved_table(image)
    before = flat(image).read_bytes()
    original = getattr(FileStorage, name)

    async def failing(self: FileStorage, *words: object) -> None:
        if self.path.endswith(where):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
        await original(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(FileStorage, name, failing)
        one_line(run(image), 1, f"{where}: no space left on device; {image} reads as before")
    assert flat(image).read_bytes() == before
    assert qemu_check(image).get("corruptions", 0) == 0
    commit(image)
    assert content(image) == (tmp_path / "base.raw").read_bytes() == before
    assert_empty(image)


def moved_table(image: Path) -> None:
    """Put the L1 table at the end, so that its header must be written, too."""
    header = header_of(image)
    with image.open("r+b") as file:
        file.seek(header.l1_table_offset)
        table = file.read(header.geometry.table_bytes)
        end = file.seek(0, os.SEEK_END)
        file.write(table)
        file.seek(0)
        file.write(replace(header, l1_table_offset=end).encode())
