"""`check` and its repair: agreement with qemu-img, nothing lost that needn't be, crashes and faults, hostile images."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from qedfuse import repair as repair_module
from qedfuse.check import MAX_PROBLEMS, CheckResult, Repair, check_image
from qedfuse.errors import CorruptError, ReadOnlyError
from qedfuse.header import FEATURE_BACKING_FILE, FEATURE_NEED_CHECK, HEADER_BYTES, Header
from qedfuse.storage import FileStorage
from tests.helpers.check_images import (
    CLUSTER,
    COVERAGE,
    ENTRIES,
    TABLE,
    Builder,
    Ram,
    contents,
    count,
    header_of,
    mapping,
    readable,
    sound,
    table_clusters,
)

Fault = Callable[[Builder, list[int], list[list[int]]], None]


def check_ram(storage: Ram, repair: Repair = Repair.NONE) -> CheckResult:
    return trio.run(partial(check_image, storage, header_of(storage.raw), repair=repair))


def check_file(path: Path, repair: Repair = Repair.NONE) -> CheckResult:
    async def work() -> CheckResult:
        storage = FileStorage.open(path, repair is not Repair.NONE)
        try:
            head = bytearray(HEADER_BYTES)
            await storage.read_into(0, memoryview(head))
            return await check_image(storage, header_of(head), repair=repair)
        finally:
            await storage.close()

    return trio.run(work)


def qemu_check(path: Path) -> tuple[int, dict[str, Any]]:
    command = ["qemu-img", "check", "-f", "qed", "--output=json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode in (0, 2, 3), done.stderr
    return done.returncode, json.loads(done.stdout)


def cli(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "qedfuse", "check", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)


def qemu_phantoms(path: Path) -> int:
    """Leaks that QEMU counts in any file of this size: it divides by cluster_size - 1 to number clusters."""
    return path.stat().st_size // CLUSTER // (CLUSTER - 1)


# Faults. QEMU knows all of these.


def nothing(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    pass


def l1_misaligned(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(1, tables[1] + 512)


def l1_reserved_value(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(1, 1)


def l1_in_header(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.raw[12:16] = struct.pack("<I", 2)  # header_size: the first cluster behind the header becomes part of it
    image.raw[CLUSTER:CLUSTER] = bytes(CLUSTER)
    image.header = Header(CLUSTER, TABLE, 2, 0, 0, 0, 2 * CLUSTER, image.header.image_size)
    image.raw[:HEADER_BYTES] = image.header.encode()
    for index, table in enumerate(tables):
        image.set_l1(index, table + CLUSTER)
        for entry in range(ENTRIES):
            (value,) = struct.unpack_from("<Q", image.raw, table + CLUSTER + 8 * entry)
            if value > 1:
                image.set_l2(table + CLUSTER, entry, value + CLUSTER)
    image.set_l1(5, CLUSTER)


def l1_outside(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(1, len(image.raw))
    image.set_l1(7, 1 << 62)
    image.set_l1(8, (1 << 64) - CLUSTER)


def l1_partly_outside(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(6, image.junk())


def l2_misaligned(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[0], 3, data[0][3] + 512)
    image.set_l2(tables[2], 1023, 2)


def l2_in_header(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.raw[:0] = b""
    image.set_l2(tables[0], 3, 0x800)
    image.set_l2(tables[0], 4, 3)


def l2_outside(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[0], 3, len(image.raw))
    image.set_l2(tables[1], 50, (1 << 63) + CLUSTER)
    image.set_l2(tables[1], 51, (1 << 64) - CLUSTER)
    image.set_l2(tables[1], 52, (1 << 63) - CLUSTER)


def l2_in_a_cut_off_cluster(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    del image.raw[-1000:]


def file_cut_off(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    del image.raw[data[1][5] :]


def data_twice(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[0], 800, data[0][0])
    image.set_l2(tables[1], 800, data[0][0])
    image.set_l2(tables[1], 801, data[2][7])


def all_data_twice(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    for entry, offset in enumerate(data[0]):
        image.set_l2(tables[2], 60 + entry, offset)


def table_twice(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(2, tables[0])


def tables_overlap(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    """The second half of table 0 is the first half of table 2."""
    image.set_l2(tables[0], 600, 0)
    image.set_l1(2, tables[0] + CLUSTER)
    image.set_l2(tables[0], 513, data[2][0])
    image.set_l2(tables[0], 514, data[2][1])


def data_is_a_later_table(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[0], 900, tables[2] + CLUSTER)


def data_is_an_earlier_table(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[2], 900, tables[0])


def data_is_its_own_table(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[1], 900, tables[1])


def data_is_the_l1_table(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l2(tables[1], 900, image.l1)


def l1_refers_to_itself(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(2, image.l1)


def table_in_data(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(2, data[0][10])


def garbage_table(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.raw[tables[1] : tables[1] + TABLE * CLUSTER] = random.Random(5).randbytes(TABLE * CLUSTER)


def leaks_in_the_middle(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.junk(3)
    image.data(tables[0], 500)
    image.junk(1)
    image.data(tables[0], 502)


def leaks_at_the_end(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.junk(3)


def leaks_and_a_cut_off_cluster(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.junk(3)
    del image.raw[-1000:]


def lost_table(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.set_l1(1, 0)


def not_closed(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    image.raw[16] |= FEATURE_NEED_CHECK


def many(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    for fault in (not_closed, leaks_in_the_middle, data_twice, l2_misaligned, data_is_a_later_table, l1_outside):
        fault(image, tables, data)
    image.set_l1(4, tables[0])


FAULTS = [
    nothing,
    l1_misaligned,
    l1_reserved_value,
    l1_in_header,
    l1_outside,
    l1_partly_outside,
    l2_misaligned,
    l2_in_header,
    l2_outside,
    l2_in_a_cut_off_cluster,
    file_cut_off,
    data_twice,
    all_data_twice,
    table_twice,
    tables_overlap,
    data_is_a_later_table,
    data_is_an_earlier_table,
    data_is_its_own_table,
    data_is_the_l1_table,
    l1_refers_to_itself,
    table_in_data,
    garbage_table,
    leaks_in_the_middle,
    leaks_at_the_end,
    leaks_and_a_cut_off_cluster,
    lost_table,
    not_closed,
    many,
]


def broken(fault: Fault) -> bytearray:
    image, tables, data = sound()
    fault(image, tables, data)
    return image.raw


# Agreement.


@pytest.mark.parametrize("fault", FAULTS)
def test_agrees_with_qemu(fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    path.write_bytes(broken(fault))
    code, expected = qemu_check(path)
    done = cli("--output=json", path)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    past_end = found["past-end-clusters"]
    assert found["leaks"] - past_end == expected.get("leaks", 0) - qemu_phantoms(path)
    for key in ("check-errors", "corruptions", "total-clusters", "allocated-clusters", "fragmented-clusters"):
        assert found[key] == expected.get(key, 0), key
    assert set(expected) <= set(found)
    if not past_end:
        assert done.returncode == code
    assert bool(found["problems"]) == bool(found["corruptions"] or found["need-check"] or past_end)
    assert path.read_bytes() == bytes(broken(fault)), "a check without -r wrote"


def test_qemu_counts_phantom_leaks(tmp_path: Path) -> None:
    """If a future QEMU does not, this test says so, and `qemu_phantoms` and the note in check.py go."""
    path = tmp_path / "image.qed"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qed", "-o", "cluster_size=4096,table_size=2", path, "64M"], check=True
    )
    subprocess.run(["qemu-io", "-f", "qed", "-c", "write 0 8M", "-c", "write 8M 9M", path], check=True)
    assert qemu_check(path)[1]["leaks"] == 1 == qemu_phantoms(path)
    assert check_file(path).leaks == 0


@pytest.mark.parametrize("options", ["cluster_size=4096,table_size=4", "cluster_size=65536", "cluster_size=2M"])
def test_images_by_qemu_are_sound(options: str, tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qed", "-o", options, path, "1G"], check=True)
    rng = random.Random(options)
    words = [f"write -P {rng.randrange(1, 255)} {rng.randrange(1000)}M {rng.randrange(1, 64) * 64}k" for _ in range(30)]
    words += [f"write -z {rng.randrange(1000)}M 4M" for _ in range(5)]
    subprocess.run(["qemu-io", "-f", "qed", path, *[w for word in words for w in ("-c", word)]], check=True)
    _, expected = qemu_check(path)
    result = check_file(path)
    assert (result.corruptions, result.leaks, result.problem_count) == (0, 0, 0)
    assert result.allocated_clusters == expected["allocated-clusters"] > 0
    assert result.fragmented_clusters == expected.get("fragmented-clusters", 0)
    assert result.total_clusters == expected["total-clusters"]
    assert result.image_end_offset == path.stat().st_size


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_agrees_with_a_plain_check(data: st.DataObject) -> None:
    """Random entries, mostly plausible: runs, holes, zero clusters, order of all kinds. Then the repair's promises."""
    image = Builder(2 * COVERAGE + data.draw(st.integers(0, 4)) * 511 * CLUSTER)
    rng = data.draw(st.randoms(use_true_random=False))
    for index in range(3):
        table = image.table(index)
        values = array("Q", bytes(8 * ENTRIES))
        for _ in range(rng.randrange(4)):
            start, length = rng.randrange(ENTRIES), rng.choice((1, 5, 100, ENTRIES))
            run = range(start, min(start + length, ENTRIES))
            offsets = [image.take(1, struct.pack("<QQ", 7, entry + 1)) for entry in run]
            if rng.randrange(2):
                rng.shuffle(offsets)
            values[run.start : run.stop] = array("Q", offsets)
        for _ in range(rng.choice((0, 0, 1, 5))):
            values[rng.randrange(ENTRIES)] = rng.choice(
                (
                    1,
                    2,
                    rng.randrange(1 << 64),
                    rng.randrange(len(image.raw) + 9),
                    rng.randrange(0, len(image.raw), 4096),
                )
            )
        image.raw[table : table + 8 * ENTRIES] = values.tobytes()
    if not rng.randrange(3):
        image.set_l1(rng.randrange(6), rng.randrange(0, len(image.raw), 4096))
    if not rng.randrange(4):
        del image.raw[len(image.raw) - rng.randrange(20000) :]
    expect_agreement_and_repair(image.raw)


def expect_agreement_and_repair(raw: bytearray) -> None:
    storage = Ram(raw)
    found, expected = check_ram(storage), count(raw)
    assert found.corruptions == expected.corruptions
    assert found.leaks - found.past_end_clusters + found.punched_clusters == expected.unreferenced
    assert (found.allocated_clusters, found.fragmented_clusters) == (expected.allocated, expected.fragmented)
    before = contents(raw)
    result = check_ram(storage, Repair.ALL)
    assert result.corruptions_fixed == found.corruptions
    expect_clean(storage)
    assert readable(before) == contents(storage.raw)


def expect_clean(storage: Ram) -> None:
    """No fault left, by the plain check, and a second repair has nothing to write."""
    left = count(storage.raw)
    assert left.corruptions == 0
    again = Ram(storage.raw)
    result = check_ram(again, Repair.ALL)
    assert again.log == []
    assert (result.corruptions, result.leaks, result.problem_count, result.need_check) == (0, 0, 0, False)
    assert result.punched_clusters == left.unreferenced


# Repair.


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
    assert left.get("leaks", 0) == result["punched-clusters"] + qemu_phantoms(path)
    assert code in (0, 3)
    assert path.stat().st_size == result["image-end-offset"]
    assert contents(path.read_bytes()) == readable(before)
    assert qemu_reads(path) == readable(before)


def qemu_reads(path: Path) -> dict[int, bytes]:
    flat = path.with_suffix(".flat")
    subprocess.run(["qemu-img", "convert", "-f", "qed", "-O", "raw", path, flat], check=True)
    raw = flat.read_bytes()
    pieces = {at // CLUSTER: raw[at : at + CLUSTER] for at in range(0, len(raw), CLUSTER)}
    return {cluster: piece for cluster, piece in pieces.items() if any(piece)}


@pytest.mark.parametrize("fault", [leaks_in_the_middle, leaks_at_the_end, leaks_and_a_cut_off_cluster, lost_table])
def test_repair_leaks_gives_space_back(fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    path.write_bytes(broken(fault))
    before, blocks, leaks = contents(path.read_bytes()), path.stat().st_blocks, check_file(path).leaks
    assert leaks > 0
    done = cli("-r", "leaks", path)
    assert done.returncode == 0
    assert f"given back: {leaks} leaked cluster" in done.stdout
    assert path.stat().st_blocks <= blocks - leaks * CLUSTER // 512
    assert contents(path.read_bytes()) == before
    assert cli(path).returncode == 0


@pytest.mark.parametrize("fault", [data_twice, lost_table, table_twice, l1_misaligned, many])
def test_repair_leaks_changes_nothing_while_corrupt(fault: Fault) -> None:
    image, tables, data = sound()
    leaks_at_the_end(image, tables, data)
    fault(image, tables, data)
    storage = Ram(image.raw)
    result = check_ram(storage, Repair.LEAKS)
    assert result.leaks if result.corruptions else not result.leaks
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
def test_clusters_past_the_end_are_leaks(repair: Repair, tmp_path: Path) -> None:
    """A table half past the end, and one that is wholly past it; QEMU counts both as used."""
    image, tables, _data = sound()
    image.header = Header(CLUSTER, TABLE, 1, 0, 0, 0, CLUSTER, COVERAGE + 30 * CLUSTER - 512)
    image.raw[:64] = image.header.encode()
    path = image.save(tmp_path / "image.qed")
    assert qemu_check(path)[0] == 0
    inside = contents(image.raw)
    found = check_file(path)
    assert found.corruptions == 0
    # table 1: entries 30..39, 600, 701; table 2: its 2 clusters and entries 2..39, 600, 702
    assert found.leaks == found.past_end_clusters == 12 + 2 + 40
    result = check_file(path, repair)
    assert (result.leaks, result.past_end_clusters, result.leaks_fixed) == (0, 0, 54)
    assert qemu_check(path)[1].get("leaks", 0) == result.punched_clusters
    assert contents(path.read_bytes()) == inside
    raw = path.read_bytes()
    assert struct.unpack_from("<Q", raw, image.l1 + 16) == (0,)
    assert not any(raw[tables[1] + 8 * 30 : tables[1] + TABLE * CLUSTER])


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
    kinds = [kind for kind, _, _ in storage.log]
    assert kinds[0] == "sync", "what the tables say must be durable before the image counts as clean"
    assert kinds[-2:] == ["write", "sync"]
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


def test_problems_are_bounded() -> None:
    storage = Ram(broken(garbage_table))
    result = check_ram(storage)
    assert len(result.problems) == MAX_PROBLEMS
    assert result.problem_count == result.corruptions > 1000


def test_progress_counts_l1_entries() -> None:
    seen: list[tuple[int, int]] = []
    storage = Ram(broken(nothing))
    trio.run(partial(check_image, storage, header_of(storage.raw), progress=lambda *step: seen.append(step)))
    assert seen == [(0, ENTRIES), (1, ENTRIES), (2, ENTRIES), (3, ENTRIES), (ENTRIES, ENTRIES)]


# Crashes and faults while repairing.


def expect_no_worse(raw: bytes, before: dict[int, bytes | None], shared: set[int]) -> None:
    """What could be read is still there in `raw`. `shared`: guest clusters that were also tables, which may change."""
    now = contents(raw)
    for cluster, content in before.items():
        if cluster in shared:
            continue
        if content is not None:
            assert now.get(cluster) == content, f"cluster {cluster} has changed"
        else:
            assert now.get(cluster) is None, f"cluster {cluster} could not be read, and now reads as something"
    assert not now.keys() - before.keys(), "data where there was none"
    storage = Ram(raw)
    check_ram(storage, Repair.ALL)
    assert count(storage.raw).corruptions == 0
    assert {c: now[c] for c in readable(now) if c not in shared} == {
        c: content for c, content in contents(storage.raw).items() if c not in shared
    }


def shared_with_tables(raw: bytes | bytearray) -> set[int]:
    tables = table_clusters(raw)
    return {cluster for cluster, offset in mapping(raw).items() if offset and offset // CLUSTER in tables}


def enumerate_crashes(raw: bytearray, seed: int, samples: int) -> int:
    storage = Ram(raw)
    check_ram(storage, Repair.ALL)
    before, shared, tried = contents(raw), shared_with_tables(raw), set()
    for state in storage.crashes(random.Random(seed), samples):
        if state not in tried:
            tried.add(state)
            expect_no_worse(state, before, shared)
    return len(tried)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_crash_in_a_repair(fault: Fault) -> None:
    states = enumerate_crashes(broken(fault), seed=1, samples=3)
    print(f"{fault.__name__}: {states} states")


def dangling_where_copies_go(image: Builder, tables: list[int], data: list[list[int]]) -> None:
    """Entries that would refer to the copies as soon as the file grows; and a last part of a cluster."""
    data_twice(image, tables, data)
    image.raw += b"tail" * 100
    end = len(image.raw) // CLUSTER * CLUSTER
    image.set_l2(tables[2], 300, end)
    image.set_l2(tables[2], 301, end + CLUSTER)
    image.set_l1(3, end)


def test_a_crash_does_not_let_a_dangling_entry_see_a_copy() -> None:
    enumerate_crashes(broken(dangling_where_copies_go), seed=2, samples=10)


@pytest.mark.parametrize("fault", [data_twice, table_twice, dangling_where_copies_go])
def test_the_crash_test_bites(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rulebook's syncs and its fence, some crash does harm, and the harness sees it."""

    async def no_fence(_self: object) -> None:
        await trio.lowlevel.checkpoint()

    if fault is dangling_where_copies_go:
        monkeypatch.setattr(repair_module._TableRepair, "fence", no_fence)
    else:
        monkeypatch.setattr(Ram, "sync", no_sync)
    with pytest.raises(AssertionError):
        enumerate_crashes(broken(fault), seed=3, samples=10)


async def no_sync(_storage: Ram) -> None:
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("synced", [True, False])
@pytest.mark.parametrize("repair", [Repair.LEAKS, Repair.ALL])
def test_what_is_released_was_released_durably(repair: Repair, synced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed daemon left entries of 0 that are not on the disk yet. Without syncs the test must see the harm."""
    image, tables, data = sound()
    image.raw[16] |= FEATURE_NEED_CHECK
    storage = Ram(image.raw)
    for entry, offset in ((5, data[0][5]), (702, data[2][-1])):
        table = tables[0] if entry == 5 else tables[2]
        assert storage.raw[table + 8 * entry : table + 8 * entry + 8] == offset.to_bytes(8, "little")
        trio.run(storage.write, table + 8 * entry, [bytes(8)])
    if not synced:
        monkeypatch.setattr(Ram, "sync", no_sync)
    assert check_ram(storage, repair).leaks_fixed == 2
    old, new = contents(image.raw), contents(storage.raw)
    wrong = 0
    for state in storage.crashes(random.Random(4), 20):
        now = contents(state)
        wrong += any(now.get(cluster) not in (old[cluster], new.get(cluster)) for cluster in old)
        wrong += not header_of(state).needs_check and count(state).corruptions > 0
    assert bool(wrong) == (not synced)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("fault", [many, dangling_where_copies_go, leaks_in_the_middle, not_closed, tables_overlap])
def test_every_operation_of_a_repair_fails_once(fault: Fault, code: int) -> None:
    raw = broken(fault)
    whole = Ram(raw)
    check_ram(whole, Repair.ALL)
    for number in range(len(whole.log)):
        storage = Ram(raw, fail_at=number)
        storage.error = code
        with pytest.raises(OSError, match=os.strerror(code)):
            check_ram(storage, Repair.ALL)
        expect_no_worse(bytes(storage.raw), contents(raw), shared_with_tables(raw))


def test_cancelled_anywhere() -> None:
    """Cancellation at every checkpoint of a repair: no worse, and a second repair finishes."""
    raw = broken(many)

    async def cancelled_after(storage: Ram, checkpoints: int) -> bool:
        async def count_down() -> None:
            for _ in range(checkpoints):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_down)
            await check_image(storage, header_of(raw), repair=Repair.ALL)
            nursery.cancel_scope.cancel()
            return False
        return True

    checkpoints, cancelled = 0, True
    while cancelled:
        storage = Ram(raw)
        cancelled = trio.run(cancelled_after, storage, checkpoints)
        expect_no_worse(bytes(storage.raw), contents(raw), shared_with_tables(raw))
        checkpoints += 3
    assert checkpoints > 30


# Hostile and huge images.


def sparse(path: Path, header: Header, file_size: int, pieces: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.write(header.encode())
        for offset, piece in pieces.items():
            file.seek(offset)
            file.write(piece)
        file.truncate(file_size)
    return path


def measure(path: Path) -> tuple[CheckResult, float, int]:
    """The result, seconds, and the memory that the check itself needed at most (bytes)."""
    import tracemalloc

    tracemalloc.start()
    start = time.monotonic()
    result = check_file(path)
    seconds, peak = time.monotonic() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, seconds, peak


def test_a_huge_sparse_file_costs_nothing(tmp_path: Path) -> None:
    """15 TiB with 4 KiB clusters: 4 billion clusters, two of them in use."""
    size = 15 << 40
    table, cluster = size // 2, size - 2 * CLUSTER
    header = Header(CLUSTER, TABLE, 1, 0, 0, 0, CLUSTER, COVERAGE)
    pieces = {CLUSTER: struct.pack("<Q", table), table: struct.pack("<QQ", cluster, 1)}
    result, seconds, peak = measure(sparse(tmp_path / "image.qed", header, size, pieces))
    assert (result.corruptions, result.leaks, result.allocated_clusters) == (0, 0, 1)
    assert result.punched_clusters == size // CLUSTER - 1 - 2 - 2 - 1
    assert seconds < 5
    assert peak < 64 << 20


def test_a_huge_sparse_l1_table_is_skipped(tmp_path: Path) -> None:
    """16 x 64 MiB of L1 table, a hole but for two entries; the L2 tables are as large."""
    cluster, tables = 64 << 20, 16
    size = cluster * tables
    header = Header(cluster, tables, 1, 0, 0, 0, cluster, 1 << 40)
    pieces = {cluster: struct.pack("<Q", cluster + size), cluster + size - 8: struct.pack("<Q", cluster + 2 * size)}
    pieces[cluster + size] = struct.pack("<Q", cluster + 3 * size)
    result, seconds, peak = measure(sparse(tmp_path / "image.qed", header, 2 * cluster + 3 * size, pieces))
    assert (result.corruptions, result.allocated_clusters) == (0, 1)
    assert result.past_end_clusters == tables
    assert seconds < 5
    assert peak < 64 << 20


def test_references_scattered_over_exabytes_are_refused(tmp_path: Path) -> None:
    size = 15 << 40
    header = Header(CLUSTER, TABLE, 1, 0, 0, 0, CLUSTER, COVERAGE)
    table = array("Q", range(1 << 38, size, size // 1000 // CLUSTER * CLUSTER))
    pieces = {CLUSTER: struct.pack("<Q", 3 * CLUSTER), 3 * CLUSTER: table.tobytes()}
    path = sparse(tmp_path / "image.qed", header, size, pieces)
    with pytest.raises(CorruptError, match="bounded memory"):
        check_file(path)
    done = cli(path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_bytes_in_tables(data: st.DataObject) -> None:
    image, _, _ = sound()
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(HEADER_BYTES, len(image.raw) - 64))
        piece = data.draw(st.binary(min_size=1, max_size=64))
        image.raw[at : at + len(piece)] = piece
    expect_agreement_and_repair(image.raw)


# The command.


def test_exit_codes_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    for fault, code in ((nothing, 0), (l1_misaligned, 2), (leaks_at_the_end, 3), (many, 2)):
        path.write_bytes(broken(fault))
        assert cli(path).returncode == code
        quiet = cli("-q", path)
        assert (quiet.returncode, quiet.stdout, quiet.stderr) == (code, "", "")
    raw = tmp_path / "raw"
    raw.write_bytes(b"raw")
    cut = tmp_path / "cut"
    cut.write_bytes(broken(nothing)[: 2 * CLUSTER])
    for words, code, text in (
        (["missing"], 1, "no such file"),
        ([raw], 63, "not a qed image"),
        ([tmp_path], 1, "directory"),
        ([cut], 1, "cut off"),
        (["-r", "some", path], 1, "some"),
        (["-U", "-r", "all", path], 1, "-U"),
        ([], 1, "IMAGE"),
    ):
        done = cli(*words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), words
        assert text in done.stderr


def test_locks(tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    path.write_bytes(broken(leaks_at_the_end))
    server = subprocess.Popen(
        ["qemu-io", "-f", "qed", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write("read 0 512\n")
        server.stdin.flush()
        while "read 512/512" not in server.stdout.readline():
            pass
        done = cli(path)
        assert done.returncode == 1 and "-U" in done.stderr
        assert cli("-r", "leaks", path).returncode == 1
        assert cli("-U", path).returncode == 3
    finally:
        server.communicate("quit\n", timeout=30)
    assert cli("-r", "leaks", path).returncode == 0


# Speed.


def terabyte(path: Path, order: str) -> Path:
    """1 TiB, all allocated, 64 KiB clusters; only the tables are written."""
    cluster, number, tables = 65536, 32768, 512
    span = 4 * cluster
    header = Header(cluster, 4, 1, 0, 0, 0, cluster, 1 << 40)
    start = cluster + span
    pieces: dict[int, bytes] = {}
    if order == "sequential":
        offsets = [start + index * (span + number * cluster) for index in range(tables)]
        end = start + tables * (span + number * cluster)
        for table in offsets:
            pieces[table] = array("Q", range(table + span, table + span + number * cluster, cluster)).tobytes()
    else:
        offsets = [start + index * span for index in range(tables)]
        first = start + tables * span
        end = first + tables * number * cluster
        run = 1 if order == "random" else 64
        starts = list(range(first, end, run * cluster))
        random.Random(1).shuffle(starts)
        entries = array("Q", (at + step for at in starts for step in range(0, run * cluster, cluster)))
        for index, table in enumerate(offsets):
            pieces[table] = entries[index * number : (index + 1) * number].tobytes()
    pieces[cluster] = array("Q", offsets).tobytes()
    return sparse(path, header, end, pieces)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "bound"), [("sequential", 2.5), ("runs of 64", 20), ("random", 40)])
def test_a_full_terabyte(order: str, bound: float, tmp_path: Path) -> None:
    """Against `qemu-img check`, best of five. Bounds are wide: they catch a lost fast path, not a busy machine."""
    path = terabyte(tmp_path / "image.qed", order)
    script = "import sys; from qedfuse.cli.main import main; code = main(['check', sys.argv[1]]); "
    script += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); sys.exit(code)"
    ours, theirs, inside = [], [], []
    for _ in range(5):
        start = time.monotonic()
        subprocess.run(["qemu-img", "check", "-q", path], check=False)
        theirs.append(time.monotonic() - start)
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
        ours.append(time.monotonic() - start)
        start = time.monotonic()
        result = check_file(path)
        inside.append(time.monotonic() - start)
    assert (result.corruptions, result.leaks, result.allocated_clusters) == (0, 0, 1 << 24)
    memory = int(done.stdout.split()[-1]) >> 10
    ratio = min(ours) / min(theirs)
    print(
        f"\n{order}: qemu-img {min(theirs):.2f} s, the command {min(ours):.2f} s (ratio {ratio:.2f}), "
        f"check_image alone {min(inside):.2f} s, {memory} MiB"
    )
    assert ratio < bound
    assert memory < 96


@pytest.mark.slow
def test_a_full_terabyte_does_not_block_the_loop(tmp_path: Path) -> None:
    path = terabyte(tmp_path / "image.qed", "random")
    gaps: list[float] = []

    async def watch() -> None:
        last = time.process_time()
        while True:
            await trio.lowlevel.checkpoint()
            now = time.process_time()
            gaps.append(now - last)
            last = now

    async def work() -> None:
        storage = FileStorage.open(path, False)
        head = bytearray(HEADER_BYTES)
        await storage.read_into(0, memoryview(head))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await check_image(storage, header_of(head))
            nursery.cancel_scope.cancel()
        await storage.close()

    trio.run(work)
    assert len(gaps) > 50
    assert max(gaps) < 0.1
