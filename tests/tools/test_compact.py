"""`qedfuse compact`: the file gets as short as what is in use, and reads the same; QEMU's tools are the judges."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from qedfuse.cli.main import main
from qedfuse.qed.header import FEATURE_NEED_CHECK, HEADER_BYTES
from tests.helpers.images.check_faults import CUT_SHORT, FAULTS, LEAKS, Fault, broken, data_twice, not_closed, nothing
from tests.helpers.images.check_images import count
from tests.helpers.images.leaky import drop, flat, header, tables_of
from tests.helpers.judges.check_tools import qemu_check
from tests.helpers.mounts.acknowledging import punch
from tests.helpers.qemu.cli import new_image, one_line, qedfuse, qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20


def result_of(capfd: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    """The JSON of a run that succeeds."""
    assert main(["compact", "--output=json", *map(str, words)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    found: dict[str, object] = json.loads(out)
    return found


def expect_compacted(path: Path, capfd: pytest.CaptureFixture[str], *, phantoms: int = 0) -> None:
    """It tells beforehand what will come of it, does it, and has nothing to do then."""
    copy, before = flat(path), path.stat()
    planned = result_of(capfd, "--dry-run", path)
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)
    assert "actual-size-after" not in planned
    done = result_of(capfd, path)
    assert planned["file-size-after"] == done["file-size-after"] == path.stat().st_size
    assert planned["file-size-before"] == done["file-size-before"] == before.st_size
    assert done["actual-size-before"] == before.st_blocks * 512
    assert done["actual-size-after"] == path.stat().st_blocks * 512
    code, theirs = qemu_check(path)
    assert "corruptions" not in theirs and theirs.get("leaks", 0) == phantoms and code in (0, 3)
    assert not header(path).needs_check
    qemu_img("compare", "-f", "qed", "-F", "raw", path, copy)
    after = path.stat()
    result_of(capfd, path)
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (after.st_mtime_ns, after.st_size)


@pytest.mark.parametrize("fault", [nothing, not_closed, *LEAKS, *CUT_SHORT])
def test_small_images(fault: Fault, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.qed"
    path.write_bytes(broken(fault))
    expect_compacted(path, capfd)
    assert count(path.read_bytes()).unreferenced == 0


def test_a_last_part_of_a_cluster_goes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = new_image(tmp_path / "image.qed", "1M", "-o", "cluster_size=4k,table_size=2", fill=1)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"left by an older program")
    expect_compacted(path, capfd)
    assert path.stat().st_size == size


def test_what_lies_past_the_end_goes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The entries of a table that is needed for others, and the tables that are not needed at all."""
    path = tmp_path / "image.qed"
    path.write_bytes(broken(CUT_SHORT[0]))
    expect_compacted(path, capfd)
    raw = path.read_bytes()
    _l1, tables = tables_of(path)
    assert sorted(tables) == [0, 1]
    assert [number for number, value in enumerate(tables[1]) if value > 1] == list(range(1, 21))
    used = sum(value > 1 for entries in tables.values() for value in entries)
    assert len(raw) == 4096 * (1 + 2 + 2 * 2 + used)


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "overlay"])
def test_a_real_image(backing: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(f"{backing}")
    path, base = tmp_path / "image.qed", tmp_path / "base.raw"
    base.write_bytes(rng.randbytes(MIB) * 4)
    words = ("-b", base.name, "-F", "raw") if backing else ()
    new_image(path, "8M", "-o", "cluster_size=4k,table_size=2", *words)
    qemu_io(path, *(f"write -P {rng.randrange(1, 255)} {rng.randrange(2048) * 4096} 4k" for _ in range(300)))
    assert drop(path, rng, 0.4) > 50
    expect_compacted(path, capfd)


def test_a_cluster_that_is_a_hole_of_the_host_stays_mapped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Over a backing file its entry hides what is below."""
    base, path = tmp_path / "base.raw", tmp_path / "image.qed"
    base.write_bytes(b"b" * MIB)
    new_image(path, "1M", "-b", base.name, "-F", "raw")
    qemu_io(path, *(f"write -P {number + 1} {number * 64}k 64k" for number in range(8)))
    entries = tables_of(path)[1][0]
    hole = entries[7]
    with path.open("r+b") as file:
        punch(file.fileno(), hole, 64 * KIB)
        file.seek(tables_of(path)[0][0])
        file.write(bytes(16))  # of the first two clusters, which are leaked then
    size = path.stat().st_size
    expect_compacted(path, capfd)
    assert path.stat().st_size == size - 2 * 64 * KIB
    moved = tables_of(path)[1][0][7]
    assert moved not in (0, 1, hole), "the last one goes first"
    with path.open("rb") as file:
        assert os.lseek(file.fileno(), moved, os.SEEK_DATA) == moved + 64 * KIB


def test_what_it_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.qed"
    path.write_bytes(broken(LEAKS[0]))
    size, less = path.stat().st_size, path.stat().st_size - 4 * 4096
    kib = size / 1024
    assert main(["compact", "--dry-run", str(path)]) == 0
    expected = f"{path}: {kib:.3g} KiB ({size} bytes) long, would get {kib - 16:.3g} KiB ({less} bytes) long\n"
    assert capfd.readouterr() == (expected, "")
    assert main(["compact", str(path)]) == 0
    out = capfd.readouterr().out
    assert out.startswith(
        f"{path}: was {kib:.3g} KiB ({size} bytes) long, is {kib - 16:.3g} KiB ({less} bytes); takes "
    )
    assert main(["compact", str(path)]) == 0
    assert capfd.readouterr().out == f"{path}: {kib - 16:.3g} KiB ({less} bytes) long, and cannot get shorter\n"
    assert main(["compact", "-q", str(path)]) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in (*LEAKS, nothing, not_closed)])
def test_a_corrupt_image_is_refused(fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    path.write_bytes(broken(fault))
    assert count(path.read_bytes()).corruptions
    before = path.read_bytes()
    for words in ((), ("--dry-run",)):
        assert main(["compact", *words, str(path)]) == 1
        assert path.read_bytes() == before


def test_the_refusal_names_the_fault_and_the_repair(tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    path.write_bytes(broken(data_twice))
    done = qedfuse("compact", path)
    one_line(done, 1, f"{path}: is corrupt (l2 entry", "used more than once): repair it first, with", "check -r all'")
    assert qedfuse("check", "-r", "all", path).code == qedfuse("compact", path).code == 0


def test_unclean_over_a_backing_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "image.qed"
    base.write_bytes(b"b" * MIB)
    new_image(path, "1M", "-b", base.name, "-F", "raw")
    qemu_io(path, "write -P 5 0 256k")
    with path.open("r+b") as file:
        head = header(path).with_feature(FEATURE_NEED_CHECK, True)
        file.write(head.encode()[:HEADER_BYTES])
    expect_compacted(path, capfd)
