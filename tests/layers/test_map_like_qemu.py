"""`map` over qcow2 bases says of zeroes what QEMU says; names that are no text are shown as QEMU shows them."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from qedfuse.host.file_storage import FileStorage
from qedfuse.layers.qcow2.layer import read_qcow2_header
from qedfuse.layers.qcow2.refcounts import is_preallocated
from tests.helpers.qemu.cli import environment, qedfuse, qemu_img, qemu_io

MIB = 1 << 20
PREALLOCATION = ["off", "metadata", "falloc", "full"]


def map_of(program: str, image: Path) -> list[dict[str, object]]:
    if program == "qemu-img":
        out = qemu_img("map", "--output=json", image)
    else:
        done = qedfuse("map", "--output=json", image)
        assert done.code == 0, done
        out = done.out
    entries: list[dict[str, object]] = json.loads(out)
    for entry in entries:
        for key in ("filename", "compressed"):
            entry.pop(key, None)
    return entries


def rows_of(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()[1:]]


def assert_same(image: Path) -> None:
    assert map_of("qedfuse", image) == map_of("qemu-img", image)
    assert rows_of(qedfuse("map", image).out) == rows_of(qemu_img("map", image))


def overlay(base: Path, size: int) -> Path:
    image = base.with_suffix(".qed")
    qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "qcow2", image, str(size))
    return image


@pytest.mark.parametrize("preallocation", PREALLOCATION)
@pytest.mark.parametrize(
    "options", ["compat=0.10", "compat=1.1", "refcount_bits=1", "refcount_bits=64,cluster_size=512"]
)
def test_preallocated(tmp_path: Path, preallocation: str, options: str) -> None:
    base = tmp_path / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"preallocation={preallocation},{options}", base, str(4 * MIB))
    image = overlay(base, 5 * MIB)
    assert_same(image)
    qemu_io(base, "write -P 1 1M 128k", "write -P 2 3M 4k", format="qcow2")
    qemu_io(image, "write -P 3 2M 64k")
    assert_same(image)


@pytest.mark.parametrize("seed", range(4))
def test_at_random(tmp_path: Path, seed: int) -> None:
    """Data, zeroes with and without a place of their own, holes, in images that may have been preallocated."""
    rnd = random.Random(seed)
    base = tmp_path / "base.qcow2"
    options = f"preallocation={rnd.choice(PREALLOCATION)},cluster_size={rnd.choice(['4k', '64k'])}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, base, str(4 * MIB))
    commands = []
    for _ in range(25):
        what = rnd.choice(["write -P 1", "write -P 2", "write -z", "write -z -u", "discard"])
        commands.append(f"{what} {rnd.randrange(60) * 64}k {rnd.randint(1, 4) * rnd.choice([4, 64])}k")
    qemu_io(base, *commands, format="qcow2")
    assert_same(overlay(base, 4 * MIB))


def test_reference_counts_that_make_no_sense(tmp_path: Path) -> None:
    """They are no reason to fail: the image can be read. The clusters are told as data then."""
    base = tmp_path / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", base, str(4 * MIB))
    good = base.read_bytes()
    if base.stat().st_blocks * 512 > 2 * MIB:
        pytest.skip("no holes on this file system")
    assert preallocated(base)
    image = overlay(base, 4 * MIB)
    for place, word in ((48, 1 << 62), (48, 7), (48, (1 << 63) - 4096), (56, 0)):
        with base.open("r+b") as file:
            file.seek(place)
            file.write(struct.pack(">Q", word) if place == 48 else bytes(4))
        assert not preallocated(base)
        assert any(entry["data"] and not entry["zero"] for entry in map_of("qedfuse", image))
        with base.open("r+b") as file:
            file.write(good[:4096])
    assert preallocated(base)


def preallocated(base: Path) -> bool:
    async def main() -> bool:
        storage = FileStorage.open(base, writable=False)
        try:
            return await is_preallocated(storage, await read_qcow2_header(storage))
        finally:
            await storage.close()

    return trio.run(main)


# -- names ------------------------------------------------------------------------------------------------------------

NAMES = [b"a\xffb", b"a\xff\xfeb", b"a\xe2\x82b", "a€😀ä".encode()]


def run(*words: str | bytes, cwd: Path) -> bytes:
    done = subprocess.run([*words], cwd=cwd, env=environment(), capture_output=True, timeout=60, check=False)
    assert done.returncode in (0, 3), done
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_names(tmp_path: Path, name: bytes) -> None:
    """Bytes that are no characters: U+FFFD in JSON, which any parser reads, and themselves elsewhere."""
    image, base = name + b".qed", name + b".raw"
    (tmp_path / os.fsdecode(base)).write_bytes(b"x" * MIB)
    run("qemu-img", "create", "-q", "-f", "qed", "-b", base, "-F", "raw", image, cwd=tmp_path)
    run("qemu-io", "-f", "qed", "-c", "write 0 64k", image, cwd=tmp_path)
    ours = (sys.executable, "-m", "qedfuse")
    shown = image.decode("utf-8", "replace")
    for command in ("info", "map", "check"):
        out = run(*ours, command, "--output=json", image, cwd=tmp_path)
        assert out.isascii()
        text = json.loads(out)
        json.dumps(text, ensure_ascii=False).encode()
        if command != "map":
            assert text["filename"] == shown
    ours_info = json.loads(run(*ours, "info", "--output=json", image, cwd=tmp_path))
    theirs = json.loads(run("qemu-img", "info", "--output=json", image, cwd=tmp_path))
    for key in ("filename", "backing-filename", "full-backing-filename"):
        assert ours_info[key] == theirs[key]
    lines = run("qemu-img", "info", image, cwd=tmp_path).splitlines()
    found = run(*ours, "info", image, cwd=tmp_path).splitlines()
    assert found[0] == lines[0] == b"image: " + image
    wanted = [line for line in lines if line.startswith(b"backing file: ")]
    assert [line for line in found if line.startswith(b"backing file: ")] == wanted
    table = run(*ours, "map", image, cwd=tmp_path)
    assert rows(table) == rows(run("qemu-img", "map", image, cwd=tmp_path))
    created = run(*ours, "create", b"new-" + image, "1M", cwd=tmp_path)
    assert image in created


def rows(table: bytes) -> list[bytes]:
    return [b" ".join(line.split()) for line in table.splitlines()[1:]]


@pytest.mark.parametrize("name", NAMES)
def test_errors(tmp_path: Path, name: bytes) -> None:
    done = qedfuse("info", os.fsdecode(name), cwd=tmp_path)
    assert os.fsencode(done.err) == b"qedfuse: " + name + b": no such file or directory\n"


def test_a_poor_encoding(tmp_path: Path) -> None:
    """What the output's encoding lacks is told in ASCII; bytes stay bytes."""
    env = {"PYTHONIOENCODING": "iso-8859-1", "PYTHONUTF8": "1"}
    done = qedfuse("info", "ä€\udcff", cwd=tmp_path, env=env)
    assert os.fsencode(done.err) == b"qedfuse: \xe4\\u20ac\xff: no such file or directory\n"
