"""`qedfuse convert --in-place` of qcow2 images, as a person uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qedfuse.chain.unfinished import SUFFIX
from tests.helpers.images.qcow2_images import create, qemu_io
from tests.helpers.images.qcow2_in_place import expect_qed
from tests.helpers.qemu.cli import ROOT, environment, qedfuse, qemu_img, tool

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = create(tmp_path / "a.qcow2", 4 * MIB)
    qemu_io(image, "write -P 1 0 128k", "write -c -P 2 192k 64k", "write -z 1M 64k")
    return image


@pytest.mark.parametrize("words", [["-f", "qcow2", "-O", "qed"], ["-O", "qed", "-o", "table_size=2"]])
def test_it_says_nothing(image: Path, words: list[str]) -> None:
    before = image.with_name("before")
    before.write_bytes(image.read_bytes())
    assert qedfuse("convert", "--in-place", *words, image) == (0, "", "")
    expect_qed(image, before)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-O", "raw"], 1, "use `qedfuse convert -f qcow2 -O raw"),
        (["-O", "qed", "-o", "cluster_size=4k"], 2, "cluster_size can only be 65536"),
        (["-O", "qed"], 1, "has internal snapshots (1), which qed has not"),
    ],
)
def test_refusals(image: Path, words: list[str], code: int, said: str) -> None:
    if code == 1 and "qed" in words:
        qemu_img("snapshot", "-c", "one", image)
    before = image.read_bytes()
    done = qedfuse("convert", "--in-place", *words, image)
    assert done.code == code and done.out == ""
    assert done.err.startswith(f"qedfuse: {image}: ") and done.err.endswith(f"; {image} is unchanged\n")
    assert said in done.err and done.err.count("\n") == 1
    assert image.read_bytes() == before and not Path(f"{image}{SUFFIX}").exists()


def test_bitmaps(image: Path) -> None:
    qemu_img("bitmap", "--add", image, "changes")
    done = qedfuse("convert", "--in-place", "-O", "qed", image)
    assert done.code == 1 and "persistent bitmaps (1), which would be lost: allow it with --force" in done.err
    assert qedfuse("convert", "--in-place", "-O", "qed", "--force", image) == (0, "", "")
    qemu_img("check", "-q", "-f", "qed", image)


def test_image_in_use(image: Path) -> None:
    """QEMU's locks keep others out."""
    before = image.read_bytes()
    words = ["qemu-io", "-f", "qcow2", str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdin is not None and user.stdout is not None
        user.stdin.write("read 0 512\n")
        user.stdin.flush()
        assert "read 512/512" in "".join(user.stdout.readline() for _ in range(1))
        done = qedfuse("convert", "--in-place", "-O", "qed", image)
        user.communicate("quit\n", timeout=60)
    assert done.code == 1 and done.err.endswith(f"; {image} is unchanged\n")
    assert image.read_bytes() == before


def test_the_example(tmp_path: Path) -> None:
    """From nothing, and of an image that is there already; it leaves nothing behind."""
    command = [str(ROOT / "examples" / "move_in_qcow2.sh")]
    more = environment({"QEDFUSE": f"{sys.executable} -m qedfuse", "TMPDIR": str(tmp_path)})
    done = subprocess.run(command, env=more, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Images are identical." in done.stdout and "No errors were found" in done.stdout
    assert list(tmp_path.iterdir()) == []
    image = create(tmp_path / "a.qcow2", MIB)
    done = subprocess.run([*command, str(image)], env=more, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tool("qemu-img", "check", "-q", "-f", "qed", image)
    assert os.listdir(tmp_path) == ["a.qcow2"]
