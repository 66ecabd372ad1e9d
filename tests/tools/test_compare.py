"""`qedfuse compare` against `qemu-img compare`: the same words, the same exit codes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qedfuse.cli.main import main
from qedfuse.layers.resolve import read_layer_into
from tests.helpers.images.conversions import CHAINS, MIB, chain_names, flat, make_chain
from tests.helpers.qemu.cli import new_image, one_line, qedfuse, qemu_has_open, qemu_img, qemu_io


def theirs(*words: object) -> tuple[int, str]:
    done = subprocess.run(
        ["qemu-img", "compare", *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout


def expect_agreement(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main(["compare", *map(str, words)])
    found = code, capfd.readouterr().out
    assert found == theirs(*words)
    return found


@pytest.mark.parametrize("chain", CHAINS, ids=chain_names(CHAINS))
def test_each_format_with_its_chain(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], chain: list[tuple[str, int]]
) -> None:
    image = make_chain(tmp_path, *chain)
    copy = flat(image)
    formats = ("-f", image.suffix[1:], "-F", "raw")
    assert expect_agreement(capfd, *formats, image, copy) == (0, "Images are identical.\n")
    assert expect_agreement(capfd, "-q", *formats, image, copy) == (0, "")
    offset = copy.stat().st_size - 1024
    with copy.open("r+b") as file:
        file.seek(offset + 511)
        last = file.read(1)[0]
        file.seek(offset + 511)
        file.write(bytes([last ^ 255]))
    assert expect_agreement(capfd, *formats, image, copy) == (1, f"Content mismatch at offset {offset}!\n")
    assert expect_agreement(capfd, "-q", *formats, image, copy) == (1, "")


def test_the_last_sector_of_an_odd_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What the file lacks of it is zeroes, in another part of the map than the rest."""
    odd, whole, other = tmp_path / "odd", tmp_path / "whole", tmp_path / "other"
    odd.write_bytes(b"x" * 1000)
    whole.write_bytes(b"x" * 1000 + bytes(24))
    other.write_bytes(b"x" * 1000 + b"y" * 24)
    formats = ("-f", "raw", "-F", "raw")
    for one, two in ((odd, whole), (whole, odd), (odd, odd)):
        assert expect_agreement(capfd, *formats, one, two) == (0, "Images are identical.\n")
    for one, two in ((odd, other), (other, odd)):
        assert main(["compare", *formats, str(one), str(two)]) == theirs(*formats, one, two)[0] == 1
        assert capfd.readouterr().out == "Content mismatch at offset 512!\n"


WRITES = st.lists(
    st.tuples(
        st.sampled_from(["-P 1", "-P 2", "-P 0", "-z"]),
        st.integers(0, 1000),
        st.sampled_from([1, 3, 8, 100, 128, 300]),
    ),
    max_size=3,
)
DISKS = st.tuples(st.sampled_from(["raw", "qed", "qcow2"]), st.sampled_from([600, 1024, 1025]))


def make(directory: Path, name: str, disk: tuple[str, int], writes: list[tuple[str, int, int]]) -> Path:
    format, sectors = disk
    path = directory / f"{name}.{format}"
    qemu_img("create", "-q", "-f", format, path, sectors * 512)
    deeds = [
        f"write -q {what} {start * 512} {min(length, sectors - start) * 512}"
        for what, start, length in writes
        if start < sectors
    ]
    if deeds:
        qemu_io(path, *deeds, format=format)
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=DISKS, other=DISKS, common=WRITES, more=WRITES)
def test_random_disks(
    capfd: pytest.CaptureFixture[str],
    one: tuple[str, int],
    other: tuple[str, int],
    common: list[tuple[str, int, int]],
    more: list[tuple[str, int, int]],
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        first = make(Path(directory), "one", one, common)
        second = make(Path(directory), "other", other, common + more)
        formats = ("-f", one[0], "-F", other[0])
        expect_agreement(capfd, *formats, first, second)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(format=st.sampled_from(["qed", "qcow2"]), common=WRITES, more=WRITES)
def test_strict_with_random_images(
    capfd: pytest.CaptureFixture[str],
    format: str,
    common: list[tuple[str, int, int]],
    more: list[tuple[str, int, int]],
) -> None:
    """Of one format: what is stored is told alike, but not always from where on. QEMU minds, too, whether what begins
    there goes on to the end of the disk. (Of a qed image's holes of the host we know more, but here are none.)"""
    with tempfile.TemporaryDirectory() as directory:
        first = make(Path(directory), "one", (format, 1024), common)
        second = make(Path(directory), "other", (format, 1024), common + more)
        words = "-s", "-f", format, "-F", format, first, second
        code = main(["compare", *map(str, words)])
        assert (code, capfd.readouterr().out.split(" ")[0]) == (theirs(*words)[0], theirs(*words)[1].split(" ")[0])


def test_strict(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, larger, zeroes = tmp_path / "one.qed", tmp_path / "larger.qed", tmp_path / "zeroes.qed"
    for path, size in ((one, "1M"), (larger, "2M"), (zeroes, "1M")):
        new_image(path, size, fill=7)
    qemu_io(zeroes, "write -P 0 128k 64k")
    copy = tmp_path / "copy.qed"
    shutil.copy(one, copy)
    assert expect_agreement(capfd, "-s", one, copy) == (0, "Images are identical.\n")
    assert expect_agreement(capfd, "-s", one, larger) == (1, "Strict mode: Image size mismatch!\n")
    assert expect_agreement(capfd, one, larger) == (0, "Warning: Image size mismatch!\nImages are identical.\n")
    assert expect_agreement(capfd, one, zeroes) == (0, "Images are identical.\n")
    assert main(["compare", "-s", str(one), str(zeroes)]) == theirs("-s", one, zeroes)[0] == 1
    assert capfd.readouterr().out == "Strict mode: Offset 131072 block status mismatch!\n"
    assert expect_agreement(capfd, "-q", "-s", one, zeroes) == (1, "")


def test_what_is_the_same_in_both_files_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroes, holes, and what two overlays have of one backing file."""
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(MIB))
    overlays = [new_image(tmp_path / f"{name}.qed", "64T", "-b", base.name, "-F", "raw") for name in "ab"]
    read: list[tuple[int, int]] = []

    async def noted(layer: object, offset: int, target: memoryview) -> None:
        read.append((offset, len(target)))
        await read_layer_into(layer, offset, target)  # type: ignore[arg-type]

    monkeypatch.setattr("qedfuse.tools.compare.read_layer_into", noted)
    assert main(["compare", *map(str, overlays)]) == 0
    assert read == []
    qemu_io(overlays[1], "write -P 1 640k 512")
    assert main(["compare", *map(str, overlays)]) == 1
    assert read == [(640 << 10, 65536)] * 2


def test_progress_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(4 * MIB))
    copy = tmp_path / "copy"
    shutil.copy(path, copy)
    assert main(["compare", "-f", "raw", "-F", "raw", "-p", str(path), str(copy)]) == 0
    out = capfd.readouterr().out
    assert "(25.00/100%)\r" in out and "(100.00/100%)\r\n" in out and out.endswith("Images are identical.\n")
    assert main(["compare", "-f", "raw", "-F", "raw", "-p", "-q", str(path), str(copy)]) == 0
    assert capfd.readouterr() == ("", "")


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("good.qed", "nothing"), "nothing: no such file"),
        (("nothing", "good.qed"), "nothing: no such file"),
        ((".", "good.qed"), ".: is a directory"),
        (("-f", "qcow2", "good.qed", "good.qed"), "good.qed: not a qcow2 image"),
        (("-F", "nonsense", "good.qed", "good.qed"), "'nonsense'"),
        (("good.qed",), "missing argument"),
        (("--no-such-option", "good.qed", "good.qed"), "no such option"),
        (("good.qed", "headless.qed"), "headless.qed: cannot open its backing file gone.qed"),
        (("--no-backing", "good.qed", "overlay.qed"), "overlay.qed"),
    ],
)
def test_what_cannot_be_opened(tmp_path: Path, words: tuple[str, ...], part: str) -> None:
    new_image(tmp_path / "good.qed", fill=1)
    new_image(tmp_path / "overlay.qed", "1M", "-b", tmp_path / "good.qed", "-F", "qed")
    new_image(tmp_path / "headless.qed", "1M", "-u", "-b", "gone.qed", "-F", "qed")
    one_line(qedfuse("compare", *words, cwd=tmp_path), 2, part)


def test_in_use(tmp_path: Path) -> None:
    path, other = new_image(tmp_path / "a.qed"), new_image(tmp_path / "b.qed")
    with qemu_has_open(path):
        one_line(qedfuse("compare", other, path), 2, f"{path}: is in use", "qemu-io", "or use -U to look at it anyway")
        assert qedfuse("compare", "-U", other, path) == (0, "Images are identical.\n", "")


def test_tables_that_cannot_be_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, other = new_image(tmp_path / "a.qed", fill=1), new_image(tmp_path / "b.qed", fill=1)
    with path.open("r+b") as file:
        file.seek(65536)
        file.write((12345).to_bytes(8, "little"))  # the L1 entry
    assert theirs(path, other)[0] == 3
    one_line(qedfuse("compare", path, other), 3, str(path))


def test_data_that_cannot_be_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = new_image(tmp_path / "a.qed", fill=1), new_image(tmp_path / "b.qed", fill=1)

    async def fails(_layer: object, _offset: int, _target: memoryview) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("qedfuse.tools.compare.read_layer_into", fails)
    assert main(["compare", str(path), str(other)]) == 4
    assert capfd.readouterr() == ("", f"qedfuse: {path}: input/output error\n")
