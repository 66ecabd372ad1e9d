"""Repair: nothing lost that needn't be, space really given back, and what is refused."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import pytest

from qedfuse.check import repair as repair_module
from qedfuse.check.check import Repair
from qedfuse.errors import CorruptError, ReadOnlyError
from qedfuse.qed.header import FEATURE_BACKING_FILE, FEATURE_NEED_CHECK, Header
from tests.helpers.doubles.image_ram import Ram
from tests.helpers.images.check_faults import (
    FAULTS,
    LEAKS,
    Fault,
    broken,
    data_twice,
    l1_misaligned,
    l2_misaligned,
    leaks_at_the_end,
    lost_table,
    many,
    nothing,
    table_twice,
)
from tests.helpers.images.check_images import (
    CLUSTER,
    COVERAGE,
    ENTRIES,
    TABLE,
    contents,
    header_of,
    mapping,
    readable,
    sound,
)
from tests.helpers.judges.check_tools import (
    check_file,
    check_ram,
    cli,
    expect_clean,
    qemu_check,
    qemu_phantoms,
)


@pytest.mark.parametrize("fault", FAULTS)
def test_repair_all(fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    path.write_bytes(broken(fault))
    before = contents(path.read_bytes())
    found = check_file(path)
    done = cli("-r", "all", "--output=json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["corruptions"], result["leaks"], result["need-check"]) == (0, 0, False)
    assert result["corruptions-fixed"] == found.corruptions
    assert result["leaks-fixed"] == found.leaks
    code, left = qemu_check(path)
    assert "corruptions" not in left
    assert left.get("leaks", 0) == qemu_phantoms(path)
    assert code == (3 if qemu_phantoms(path) else 0)
    assert path.stat().st_size == result["image-end-offset"]
    assert contents(path.read_bytes()) == readable(before)
    assert qemu_reads(path) == readable(before)


def qemu_reads(path: Path) -> dict[int, bytes]:
    flat = path.with_suffix(".flat")
    subprocess.run(["qemu-img", "convert", "-f", "qed", "-O", "raw", path, flat], check=True)
    raw = flat.read_bytes()
    pieces = {at // CLUSTER: raw[at : at + CLUSTER] for at in range(0, len(raw), CLUSTER)}
    return {cluster: piece for cluster, piece in pieces.items() if any(piece)}


@pytest.mark.parametrize("fault", LEAKS)
def test_repair_leaks_gives_space_back(fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    path.write_bytes(broken(fault))
    before, blocks, leaks = contents(path.read_bytes()), path.stat().st_blocks, check_file(path).leaks
    size = path.stat().st_size // CLUSTER * CLUSTER
    assert leaks > 0
    done = cli("-r", "leaks", path)
    assert done.returncode == 0
    assert f"given back: {leaks} leaked cluster" in done.stdout
    assert path.stat().st_blocks <= blocks - leaks * CLUSTER // 512
    assert path.stat().st_size == size - leaks * CLUSTER
    assert contents(path.read_bytes()) == before
    assert cli(path).returncode == qemu_check(path)[0] == 0


@pytest.mark.parametrize("fault", [data_twice, lost_table, table_twice, l1_misaligned, many])
def test_repair_leaks_changes_nothing_while_corrupt(fault: Fault) -> None:
    image, tables, data = sound()
    leaks_at_the_end(image, tables, data)
    fault(image, tables, data)
    storage = Ram(image.raw)
    result = check_ram(storage, Repair.LEAKS)
    assert bool(result.leaks) is bool(result.corruptions)
    assert bool(storage.log) == (not result.corruptions)


def test_two_references_each_keep_their_data() -> None:
    image, tables, data = sound()
    data_twice(image, tables, data)
    storage = Ram(image.raw)
    assert check_ram(storage, Repair.ALL).corruptions_fixed == 3
    where = mapping(storage.raw)
    same = [where[0], where[800], where[ENTRIES + 800]]
    assert len(set(same)) == 3
    assert len({bytes(storage.raw[at : at + CLUSTER]) for at in same if at}) == 1
    assert where[0] == data[0][0], "the first one stays"


def test_an_invalid_entry_exposes_the_backing_file(tmp_path: Path) -> None:
    """As QEMU does it."""
    backing = tmp_path / "backing.raw"
    backing.write_bytes(b"B" * (3 * COVERAGE))
    path = tmp_path / "image.qed"
    image, tables, data = sound()
    l2_misaligned(image, tables, data)
    name = b"backing.raw"
    image.raw[64 : 64 + len(name)] = name
    image.header = Header(CLUSTER, TABLE, 1, FEATURE_BACKING_FILE | 4, 0, 0, CLUSTER, 3 * COVERAGE, 64, len(name))
    image.raw[:64] = image.header.encode()
    image.save(path)
    assert cli("-r", "all", path).returncode == 0
    done = subprocess.run(
        ["qemu-io", "-f", "qed", "-c", f"read -P 0x42 {3 * CLUSTER} 4096", path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "read 4096/4096" in done.stdout and "failed" not in done.stdout


@pytest.mark.parametrize("repair", [Repair.LEAKS, Repair.ALL])
def test_clusters_past_the_end_are_used(repair: Repair, tmp_path: Path) -> None:
    """A table half past the end, and one that is wholly past it, as after a shrink."""
    image, _tables, _data = sound()
    image.header = Header(CLUSTER, TABLE, 1, 0, 0, 0, CLUSTER, COVERAGE + 30 * CLUSTER - 512)
    image.raw[:64] = image.header.encode()
    path = image.save(tmp_path / "image.qed")
    assert qemu_check(path)[0] == 0
    before = path.read_bytes()
    found = check_file(path)
    # table 1: entries 30..39, 600, 701; table 2: its 2 clusters and entries 2..39, 600, 702
    assert (found.corruptions, found.leaks, found.past_end_clusters) == (0, 0, 12 + 2 + 40)
    assert check_file(path, repair).past_end_clusters == 12 + 2 + 40
    assert path.read_bytes() == before
    assert qemu_check(path)[0] == 0


def test_clusters_past_the_end_go_with_a_repair_of_the_tables(tmp_path: Path) -> None:
    """An entry there that refers to what is used inside is corrupt; those that are not are dropped with it."""
    image, tables, data = sound()
    image.header = Header(CLUSTER, TABLE, 1, 0, 0, 0, CLUSTER, COVERAGE + 30 * CLUSTER - 512)
    image.raw[:64] = image.header.encode()
    image.set_l2(tables[1], 800, data[0][0])
    path = image.save(tmp_path / "image.qed")
    inside, size = contents(image.raw), path.stat().st_size
    found = check_file(path)
    assert (found.corruptions, found.leaks, found.past_end_clusters) == (1, 0, 12 + 2 + 40)
    result = check_file(path, Repair.ALL)
    assert (result.corruptions, result.leaks, result.past_end_clusters) == (0, 0, 0)
    assert qemu_check(path)[0] == 0
    assert contents(path.read_bytes()) == inside
    assert path.stat().st_size == result.image_end_offset == size - (12 + 2 + 40) * CLUSTER


def test_need_check_and_autoclear() -> None:
    image, _, _ = sound()
    image.header = Header(CLUSTER, TABLE, 1, FEATURE_NEED_CHECK, 0xF0, 0xFF00, CLUSTER, 3 * COVERAGE)
    image.raw[:64] = image.header.encode()
    storage = Ram(image.raw)
    result = check_ram(storage)
    assert result.need_check and result.problem_count == 1 and storage.log == []
    result = check_ram(storage, Repair.LEAKS)
    header = header_of(storage.raw)
    assert header == result.header
    assert (header.features, header.compat_features, header.autoclear_features) == (0, 0xF0, 0)
    kinds = [change.kind for change in storage.log]
    assert kinds[0] == "synced", "what the tables say must be durable before the image counts as clean"
    assert kinds[-2:] == ["write", "synced"]
    expect_clean(storage)


def test_a_sound_image_is_not_written() -> None:
    storage = Ram(broken(nothing))
    check_ram(storage, Repair.ALL)
    assert storage.log == []


def test_repair_needs_a_writable_file() -> None:
    storage = Ram(broken(data_twice), writable=False)
    with pytest.raises(ReadOnlyError, match="read-only"):
        check_ram(storage, Repair.ALL)


def test_an_unreadable_table_stops_a_repair() -> None:
    image, tables, data = sound()
    leaks_at_the_end(image, tables, data)
    storage = Ram(image.raw)
    storage.unreadable = range(tables[1], tables[1] + 1)
    result = check_ram(storage, Repair.ALL)
    assert (result.check_errors, result.leaks, storage.log) == (1, 0, [])
    assert "cannot be read" in result.problems[0]


def test_too_much_to_copy_is_refused_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair_module, "MIN_COPY_LIMIT", 1 << 20)
    image, tables, _data = sound()
    for index in range(3, ENTRIES):
        image.set_l1(index, tables[0])
    image.raw[56 - 8 : 56] = struct.pack("<Q", ENTRIES * COVERAGE)
    storage = Ram(image.raw)
    with pytest.raises(CorruptError, match="would copy over"):
        check_ram(storage, Repair.ALL)
    assert storage.log == []
