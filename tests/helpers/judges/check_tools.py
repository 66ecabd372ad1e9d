"""Running the check, ours and QEMU's, and what a repair must leave."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import trio

from qedfuse.check.check import Repair, check_image
from qedfuse.check.result import CheckResult
from qedfuse.host.file_storage import FileStorage
from qedfuse.qed.header import HEADER_BYTES, Header
from tests.helpers.doubles.image_ram import Ram
from tests.helpers.images.check_images import (
    CLUSTER,
    contents,
    count,
    header_of,
    mapping,
    readable,
    table_clusters,
)


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


def sparse(path: Path, header: Header, file_size: int, pieces: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.write(header.encode())
        for offset, piece in pieces.items():
            file.seek(offset)
            file.write(piece)
        file.truncate(file_size)
    return path


def expect_agreement_and_repair(raw: bytearray) -> None:
    storage = Ram(raw)
    found, expected = check_ram(storage), count(raw)
    assert found.corruptions == expected.corruptions
    assert found.leaks == expected.unreferenced
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
    assert left.unreferenced == 0


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
    left = count(storage.raw)
    assert left.corruptions == left.unreferenced == 0
    assert {c: now[c] for c in readable(now) if c not in shared} == {
        c: content for c, content in contents(storage.raw).items() if c not in shared
    }


def shared_with_tables(raw: bytes | bytearray) -> set[int]:
    tables = table_clusters(raw)
    return {cluster for cluster, offset in mapping(raw).items() if offset and offset // CLUSTER in tables}
