"""`qedfuse resize`: what stays reads the same, what is added as zeroes, and it says what qemu-img says."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from qedfuse.cli.main import main
from qedfuse.qed.header import HEADER_BYTES
from tests.helpers.images.check_images import header_of
from tests.helpers.images.conversions import MIB, flat, qemu_finds_no_error, usage
from tests.helpers.qemu.cli import Result, new_image, one_line, qedfuse, qemu_img, qemu_io

KIB, GIB, TIB = 1 << 10, 1 << 30, 1 << 40
CLUSTER = 4096
#: What (4k, 2) maps at most.
LARGEST = 4 * GIB
SIZES = [1, 512, 513, CLUSTER - 1, CLUSTER, CLUSTER + 1, 3 * CLUSTER + 512, MIB - 512, MIB + 512, 4 * MIB, 5 * MIB + 7]


def virtual_size(path: Path) -> int:
    size = json.loads(qemu_img("info", "--output=json", path))["virtual-size"]
    assert isinstance(size, int)
    return size


def resize(*words: object) -> None:
    assert main(["resize", "-q", "--shrink", *map(str, words)]) == 0


def make(directory: Path, kind: str) -> Path:
    """An image of 2 MiB with data all over it, and what its kind is over."""
    path = directory / "image.qed"
    words: tuple[str, ...] = ()
    if kind != "alone":
        base = directory / "base.raw"
        base.write_bytes(random.Random(3).randbytes(MIB if kind == "shorter below" else 4 * MIB))
        words = ("-b", base.name, "-F", "raw")
    new_image(path, "2M", "-o", "cluster_size=4k,table_size=2", *words)
    rng = random.Random(kind)
    qemu_io(path, *(f"write -P {rng.randrange(1, 255)} {rng.randrange(4000) * 512} 5k" for _ in range(150)))
    return path


@pytest.mark.parametrize("kind", ["alone", "longer below", "shorter below"])
def test_shorter_and_longer(tmp_path: Path, kind: str) -> None:
    """Each size from a longer disk and from a shorter one. QEMU reads what we have left, and the other way round."""
    image = make(tmp_path, kind)
    model = flat(image)
    for wanted in (*reversed(SIZES), *SIZES, LARGEST - 511, 2 * MIB + 1):
        resize("-f", "qed", image, wanted)
        rounded = -(-wanted // 512) * 512
        os.truncate(model, rounded)
        with image.open("rb") as file:
            assert header_of(file.read(HEADER_BYTES)).image_size == rounded
        qemu_img("compare", "-f", "qed", "-F", "raw", image, model)
        assert main(["check", "-q", str(image)]) == 0
        if wanted == 3 * CLUSTER + 512:
            qemu_finds_no_error(image)
            qemu_io(image, "write -P 77 4k 4k")  # a part of a zero cluster it fills from the backing file: its fault
            qemu_io(model, "write -P 77 4k 4k", format="raw")
    qemu_finds_no_error(image)


@pytest.mark.parametrize("size", SIZES)
def test_raw(tmp_path: Path, size: int) -> None:
    disk, model = tmp_path / "disk", tmp_path / "model"
    disk.write_bytes(random.Random(4).randbytes(2 * MIB + 100))
    shutil.copy(disk, model)
    for wanted in (size, 3 * MIB, 64 * GIB + size, size):
        resize("-f", "raw", disk, wanted)
        os.truncate(model, -(-wanted // 512) * 512)
        assert disk.stat().st_size == model.stat().st_size
        assert usage(disk) <= 2 * MIB + CLUSTER
        qemu_img("compare", "-f", "raw", "-F", "raw", disk, model)


def test_what_is_cut_off_is_given_back(tmp_path: Path) -> None:
    """The space at once; that the file gets shorter, too, is for `compact` to see to."""
    image = new_image(tmp_path / "image.qed", "4M")
    qemu_io(image, "write -P 1 0 4M")
    resize(image, MIB)
    assert usage(image) <= MIB + 9 * 64 * KIB
    qemu_finds_no_error(image)
    assert main(["compact", "-q", str(image)]) == 0
    assert image.stat().st_size == MIB + 9 * 64 * KIB
    qemu_finds_no_error(image)


#: Both on a copy of the same image; the rest is the same for both.
ALIKE = [
    ("3M",),
    ("+512",),
    ("+1k",),
    ("+0",),
    ("2M",),
    ("2.5M",),
    ("0x300000",),
    ("-q", "3M"),
    ("--preallocation=off", "3M"),
    ("1M",),
    ("-512",),
    ("0",),
    ("-2M",),
    ("--shrink", "0"),
    ("--shrink", "-2M"),
    ("--shrink", "--", "-9G"),
    ("--preallocation=metadata", "3M"),
    ("--preallocation=nonsense", "3M"),
    ("99P",),
    ("1x",),
    ("+",),
    ("+-3",),
    ("--nonsense", "1M"),
]


@pytest.mark.parametrize("format", ["qed", "raw"])
@pytest.mark.parametrize("words", ALIKE, ids=" ".join)
def test_as_qemu_img(tmp_path: Path, capfd: pytest.CaptureFixture[str], format: str, words: tuple[str, ...]) -> None:
    ours, theirs = tmp_path / f"ours.{format}", tmp_path / f"theirs.{format}"
    qemu_img("create", "-q", "-f", format, ours, "2M")
    shutil.copy(ours, theirs)
    options, size = words[:-1], words[-1]
    separator = [word for word in options if word == "--"]
    options = tuple(word for word in options if word != "--")
    line = ["qemu-img", "resize", "-f", format, *options, *separator, str(theirs), size]
    judge = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    code = main(["resize", "-f", format, *options, *separator, str(ours), size])
    done = Result(code, *capfd.readouterr())
    assert (done.code == 0, done.out) == (judge.returncode == 0, judge.stdout), (done, judge.stderr)
    assert virtual_size(ours) == virtual_size(theirs)
    if done.code:
        one_line(done, done.code)
        assert ours.read_bytes() == theirs.read_bytes()
        for text in ("se the --shrink option to perform a shrink operation", "ew image size must be positive"):
            assert (text in done.err) == (text in judge.stderr)


@pytest.mark.parametrize("words", [("--shrink", "1M"), ("--shrink", "-512"), ("2097151",)])
def test_what_qemu_does_not_do(tmp_path: Path, words: tuple[str, ...]) -> None:
    image = new_image(tmp_path / "image.qed", "2M")
    done = qedfuse("resize", *words[:-1], image, words[-1])
    assert done == (0, "Image resized.\n", "")
    assert virtual_size(image) == {"1M": MIB, "-512": 2 * MIB - 512, "2097151": 2 * MIB}[words[-1]]


def test_to_the_largest_and_no_further(tmp_path: Path) -> None:
    image = new_image(tmp_path / "image.qed", "1M", "-o", "cluster_size=4k,table_size=2", fill=3)
    assert qedfuse("resize", image, "4G") == (0, "Image resized.\n", "")
    qemu_io(image, f"write -P 9 {LARGEST - 512} 512")
    before = image.read_bytes()
    for size in ("+1", str(LARGEST + 512), "7E"):
        one_line(
            qedfuse("resize", image, size), 1, f"{image}: file too large: this geometry maps at most {LARGEST} bytes"
        )
    assert image.read_bytes() == before and virtual_size(image) == LARGEST


def test_a_large_image_at_once(tmp_path: Path) -> None:
    """Nothing is stored for what is added."""
    image = new_image(tmp_path / "image.qed", "1M", fill=3)
    before = image.stat().st_size
    assert qedfuse("resize", image, "64T") == (0, "Image resized.\n", "")
    assert virtual_size(image) == 64 * TIB and image.stat().st_size == before


def test_a_format_that_was_guessed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    done = qedfuse("resize", disk, "2M")
    assert (done.code, done.out, disk.stat().st_size) == (0, "Image resized.\n", 2 * MIB)
    assert (
        done.err == f"qedfuse: {disk}: warning: its format was not given, and guessed to be raw; name it, with -f raw\n"
    )
    assert qedfuse("resize", "-f", "raw", disk, "3M") == (0, "Image resized.\n", "")


def test_other_formats(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    before = image.read_bytes()
    for words in ((), ("-f", "qcow2")):
        one_line(qedfuse("resize", *words, image, "2M"), 1, f"{image}: is a qcow2 image")
    one_line(qedfuse("resize", "-f", "qed", image, "2M"), 1, f"{image}: not a qed image")
    assert image.read_bytes() == before
