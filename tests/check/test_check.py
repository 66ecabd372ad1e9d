"""`check`: agreement with qemu-img, hostile and huge images, the command."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import time
from array import array
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from qedfuse.check.check import Repair, check_image
from qedfuse.check.result import MAX_PROBLEMS, CheckResult
from qedfuse.errors import CorruptError
from qedfuse.qed.header import HEADER_BYTES, Header
from tests.helpers.doubles.image_ram import Ram
from tests.helpers.images.check_faults import (
    FAULTS,
    Fault,
    all_data_twice,
    broken,
    garbage_table,
    l1_misaligned,
    leaks_at_the_end,
    many,
    nothing,
)
from tests.helpers.images.check_images import (
    CLUSTER,
    COVERAGE,
    ENTRIES,
    TABLE,
    Builder,
    header_of,
    sound,
)
from tests.helpers.judges.check_tools import (
    check_file,
    check_ram,
    cli,
    expect_agreement_and_repair,
    qemu_check,
    qemu_phantoms,
    sparse,
)

# Agreement.


@pytest.mark.parametrize("fault", FAULTS)
def test_agrees_with_qemu(fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    path.write_bytes(broken(fault))
    code, expected = qemu_check(path)
    done = cli("--output=json", path)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["leaks"] == expected.get("leaks", 0) - qemu_phantoms(path)
    for key in ("check-errors", "corruptions", "total-clusters", "allocated-clusters", "fragmented-clusters"):
        assert found[key] == expected.get(key, 0), key
    assert set(expected) <= set(found)
    assert done.returncode == code
    assert bool(found["problems"]) == bool(found["corruptions"] or found["need-check"])
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


# Hostile and huge images.


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
    assert (result.corruptions, result.allocated_clusters) == (0, 1)
    assert result.leaks == size // CLUSTER - 1 - 2 - 2 - 1
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


def test_a_repair_shows_progress_between_its_checks() -> None:
    """A walk each: what to copy, the fence, the copies, the entries."""
    seen: list[int] = []
    storage = Ram(broken(all_data_twice))
    header = header_of(storage.raw)
    trio.run(partial(check_image, storage, header, repair=Repair.ALL, progress=lambda done, _total: seen.append(done)))
    first, last = (position for position, done in enumerate(seen) if done == ENTRIES)
    assert seen[first:last].count(0) == 4 + 1  # the second check begins, too


# The command.


def test_exit_codes_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    for fault, code in ((nothing, 0), (l1_misaligned, 2), (leaks_at_the_end, 3), (many, 2)):
        path.write_bytes(broken(fault))
        assert cli(path).returncode == code
        quiet = cli("-q", "-f", "qed", path)
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
        (["-f", "raw", path], 1, "'raw' is not 'qed'"),
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
        repair = cli("-r", "leaks", path)
        assert repair.returncode == 1 and "in use" in repair.stderr and "-U" not in repair.stderr
        assert cli("-U", path).returncode == 3
    finally:
        server.communicate("quit\n", timeout=30)
    assert cli("-r", "leaks", path).returncode == 0
