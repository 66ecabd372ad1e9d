"""`qedfuse map`: the extents of `qemu-img map`, exactly, and a 64 TiB image in no time and no memory."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qedfuse.cli.main import main
from tests.helpers.qemu.cli import environment, one_line, qedfuse, qemu_has_open, qemu_img, qemu_io

MIB = 1 << 20
GEOMETRIES = [("4k", 2), ("4k", 4), ("4k", 16), ("64k", 2), ("64k", 4), ("64k", 16), ("2M", 2), ("2M", 4)]
QEMU_KEYS = ("start", "length", "depth", "present", "zero", "data", "offset")

Entries = list[dict[str, Any]]


def qemu_map(*args: str) -> Entries:
    """`qemu-img map`, without its entry of length 0 for an empty range and without what only newer ones have."""
    entries: Entries = json.loads(qemu_img("map", "-f", "qed", "--output=json", *args))
    return as_qemu([entry for entry in entries if entry["length"]])


def our_map(capsys: pytest.CaptureFixture[str], *args: str) -> Entries:
    assert main(["map", "--output=json", *args]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    entries: Entries = json.loads(out)
    return entries


def as_qemu(entries: Entries) -> Entries:
    return [{key: entry[key] for key in QEMU_KEYS if key in entry} for entry in entries]


def assert_same(capsys: pytest.CaptureFixture[str], *args: str) -> Entries:
    ours = our_map(capsys, *args)
    assert as_qemu(ours) == qemu_map(*args)
    return ours


def scatter(path: str, size: int, seed: int, zeroes: bool = True) -> None:
    """Writes and zeroes all over an image, none of which QEMU's driver miscounts."""
    rng = random.Random(seed)
    commands = []
    for _ in range(25):
        offset = rng.randrange(size // 512) * 512
        length = min(rng.choice([512, 4096, 70_144, 300_032, 1_500_160]), size - offset)
        kind = rng.choice(["write -P 5", "write -P 6", "write -z"] if zeroes else ["write -P 5"])
        commands.append(f"{kind} {offset} {length}")
    qemu_io(path, *commands)


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("cluster_size", "table_size"), GEOMETRIES)
class TestAsQemu:
    def test_alone(self, capsys: pytest.CaptureFixture[str], cluster_size: str, table_size: int) -> None:
        options = f"cluster_size={cluster_size},table_size={table_size}"
        qemu_img("create", "-q", "-f", "qed", "-o", options, "a.qed", str(40 * MIB + 1536))
        assert len(assert_same(capsys, "a.qed")) == 1
        scatter("a.qed", 40 * MIB, table_size)
        assert len(assert_same(capsys, "a.qed")) > 2

    def test_chain(self, capsys: pytest.CaptureFixture[str], cluster_size: str, table_size: int) -> None:
        """raw <- qed <- qed, each of another size, the raw file with holes and an odd end."""
        options = f"cluster_size={cluster_size},table_size={table_size}"
        with open("base", "wb") as file:
            for start, length in [(0, 65536), (3 * MIB, 4096), (9 * MIB + 4096, 200_000)]:
                file.seek(start)
                file.write(b"b" * length)
            file.truncate(12 * MIB + 333)
        os.mkdir("sub")
        qemu_img("create", "-q", "-f", "qed", "-o", options, "-b", "../base", "-F", "raw", "sub/mid.qed", "15M")
        qemu_img("create", "-q", "-f", "qed", "-o", options, "-b", "sub/mid.qed", "-F", "qed", "top.qed", "20M")
        scatter("sub/mid.qed", 15 * MIB, 1 + table_size)
        scatter("top.qed", 20 * MIB, 2 + table_size)
        for image in ("top.qed", "sub/mid.qed"):
            ours = assert_same(capsys, image)
            names = ["top.qed", "sub/mid.qed", "sub/../base"][-3 if image == "top.qed" else -2 :]
            assert all(entry["filename"] == names[entry["depth"]] for entry in ours if "offset" in entry)
            assert main(["map", "-f", "qed", image]) == 0
            assert capsys.readouterr().out == qemu_img("map", "-f", "qed", image)

    def test_layer_below_is_longer(
        self, capsys: pytest.CaptureFixture[str], cluster_size: str, table_size: int
    ) -> None:
        options = f"cluster_size={cluster_size},table_size={table_size}"
        qemu_img("create", "-q", "-f", "qed", "-o", options, "below.qed", "20M")
        scatter("below.qed", 20 * MIB, 3)
        qemu_img("create", "-q", "-f", "qed", "-o", options, "-b", "below.qed", "-F", "qed", "a.qed", "7M")
        scatter("a.qed", 7 * MIB, 4)
        assert_same(capsys, "a.qed")


@pytest.mark.parametrize(
    "options",
    [
        ("-s", "100k"),
        ("--start-offset=100", "--max-length=1000001"),
        ("--start-offset=3M", "--max-length=5M"),
        ("-s", "1234567", "-l", "1"),
        ("-s", "9M", "-l", "100G"),
        ("-s", "100M"),
        ("-l", "0"),
        ("-s", "9223372036854775807"),
        ("-s", "1M", "-l", "9223372036854775807"),
    ],
)
def test_part(capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    with open("base", "wb") as file:
        file.truncate(5 * MIB)
        file.seek(2 * MIB)
        file.write(b"x" * MIB)
    qemu_img("create", "-q", "-f", "qed", "-b", "base", "-F", "raw", "a.qed", "10M")
    qemu_io("a.qed", "write 0 70k", "write 3500k 1M", "write -z 6M 1M", "write 9M 64k")
    if options == ("-s", "1M", "-l", "9223372036854775807"):  # QEMU adds them up to a negative number
        assert our_map(capsys, *options, "a.qed") == our_map(capsys, "-s", "1M", "a.qed")
    else:
        assert_same(capsys, *options, "a.qed")


def test_qcow2_below(capsys: pytest.CaptureFixture[str]) -> None:
    with open("raw", "wb") as file:
        file.truncate(4 * MIB)
        file.write(b"text " * 200_000)
    qemu_img("convert", "-c", "-O", "qcow2", "raw", "cow.qcow2")
    qemu_io("cow.qcow2", "write -P 3 2M 256k", format="qcow2")
    qemu_img("create", "-q", "-f", "qed", "-b", "cow.qcow2", "-F", "qcow2", "a.qed", "6M")
    qemu_io("a.qed", "write 192k 64k")
    ours = assert_same(capsys, "a.qed")
    compressed = [entry for entry in ours if entry["compressed"]]
    assert sum(entry["length"] for entry in compressed) == (1 << 20) - 65536
    assert all("offset" not in entry and entry["depth"] == 1 for entry in compressed)
    assert main(["map", "a.qed"]) == 0
    assert "compressed" in capsys.readouterr().out


def test_table_size_1(capsys: pytest.CaptureFixture[str]) -> None:
    """Which QEMU cannot read: an image made by hand. 4 KiB clusters, so an L2 table maps 2 MiB."""
    assert main(["create", "-q", "-o", "cluster_size=4k,table_size=1", "a.qed", "7M"]) == 0
    assert "QEMU cannot open" in capsys.readouterr().err
    with open("a.qed", "r+b") as file:
        file.truncate(6 * 4096)
        file.seek(4096)
        file.write(struct.pack("<3Q", 0, 2 * 4096, 0))
        file.seek(2 * 4096)
        file.write(struct.pack("<5Q", 0, 1, 3 * 4096, 4 * 4096, 5 * 4096))
        file.seek(3 * 4096)
        file.write(b"data" * 3 * 1024)
    absent = {"depth": 0, "present": False, "zero": True, "data": False}
    zero = {"depth": 0, "present": True, "zero": True, "data": False}
    data = {"depth": 0, "present": True, "zero": False, "data": True, "offset": 12288}
    assert as_qemu(our_map(capsys, "a.qed")) == [
        {"start": 0, "length": 2 * MIB + 4096, **absent},
        {"start": 2 * MIB + 4096, "length": 4096, **zero},
        {"start": 2 * MIB + 8192, "length": 12288, **data},
        {"start": 2 * MIB + 20480, "length": 5 * MIB - 20480, **absent},
    ]


def test_empty_image(capsys: pytest.CaptureFixture[str]) -> None:
    qemu_img("create", "-q", "-f", "qed", "a.qed", "0")
    assert our_map(capsys, "a.qed") == []
    assert main(["map", "a.qed"]) == 0
    assert capsys.readouterr().out == qemu_img("map", "a.qed")


def test_image_in_use() -> None:
    qemu_img("create", "-q", "-f", "qed", "a.qed", "1M")
    qemu_io("a.qed", "write 64k 64k")
    with qemu_has_open("a.qed"):
        one_line(qedfuse("map", "a.qed"), 1, "a.qed", "in use", "use -U to look at it anyway")
        result = qedfuse("map", "-U", "--output=json", "a.qed")
        assert as_qemu(json.loads(result.out)) == qemu_map("-U", "a.qed")
    assert qedfuse("map", "a.qed").code == 0


def test_corrupt_table() -> None:
    qemu_img("create", "-q", "-f", "qed", "a.qed", "1M")
    with open("a.qed", "r+b") as file:
        file.seek(65536)
        file.write(struct.pack("<Q", 12345))
    one_line(qedfuse("map", "a.qed"), 1, "a.qed", "corrupt", "l1 entry 0")


def test_broken_chain() -> None:
    qemu_img("create", "-q", "-f", "qed", "-u", "-b", "gone", "-F", "raw", "a.qed", "1M")
    one_line(qedfuse("map", "a.qed"), 1, "a.qed", "gone", "no such file")


class Measured:
    """A run of the command: its lines of output, seconds of wall time, and memory at its peak in bytes."""

    def __init__(self, *args: str) -> None:
        start = time.monotonic()
        command = [sys.executable, "-m", "qedfuse", *args]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            self.lines = sum(1 for _ in process.stdout)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        self.seconds = time.monotonic() - start
        self.memory = usage.ru_maxrss << 10


def test_64_tib() -> None:
    assert main(["create", "-q", "empty.qed", "64T"]) == 0
    run = Measured("map", "--output=json", "empty.qed")
    assert run.lines == 1
    assert run.seconds < 5


def test_memory_is_bounded() -> None:
    """A hundred thousand extents, no two in order, and then nothing for 63 TiB: as much memory as for one extent."""
    assert main(["create", "-q", "a.qed", "64T"]) == 0
    tables, entries = 4, 1 << 15
    with open("a.qed", "r+b") as file:
        file.seek(65536)
        file.write(struct.pack(f"<{tables}Q", *((5 + 4 * index) << 16 for index in range(tables))))
        for index in range(tables):
            file.seek((5 + 4 * index) << 16)
            base = 5 + 4 * tables + index * entries
            file.write(struct.pack(f"<{entries}Q", *((base + (number ^ 1)) << 16 for number in range(entries))))
        file.truncate((5 + 4 * tables + tables * entries) << 16)
    one = Measured("map", "--output=json", "--max-length=64k", "a.qed")
    assert one.lines == 1
    all_of_it = Measured("map", "--output=json", "a.qed")
    assert all_of_it.lines == tables * entries + 1
    assert all_of_it.memory < one.memory + (8 << 20)
