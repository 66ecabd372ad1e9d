"""The check of a full 1 TiB image against qemu-img's."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest
import trio

from qedfuse.check.check import check_image
from qedfuse.host.file_storage import FileStorage
from qedfuse.qed.header import HEADER_BYTES, Header
from tests.helpers.images.check_images import header_of
from tests.helpers.judges.breathing import breathing
from tests.helpers.judges.check_tools import check_file, sparse


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


def cpu_seconds(*command: object) -> tuple[float, str]:
    """What a command takes of the processor, which other work on the machine changes little, and its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("order", ["sequential", "runs of 64", "random"])
def test_a_full_terabyte(order: str, tmp_path: Path) -> None:
    """Against `qemu-img check`, best of five. It takes 0.7 to 0.9 of the time; a busy machine may need more."""
    path = terabyte(tmp_path / "image.qed", order)
    script = "import sys; from qedfuse.cli.main import main; code = main(['check', '-q', sys.argv[1]]); "
    script += "print(code, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    ours, theirs, inside = [], [], []
    for _ in range(5):
        theirs.append(cpu_seconds("qemu-img", "check", "-q", path)[0])
        seconds, output = cpu_seconds(sys.executable, "-c", script, path)
        code, memory = map(int, output.split())
        assert code == 0
        ours.append(seconds)
        start = time.process_time()
        result = check_file(path)
        inside.append(time.process_time() - start)
    assert (result.corruptions, result.leaks, result.allocated_clusters) == (0, 0, 1 << 24)
    ratio = min(ours) / min(theirs)
    print(
        f"figures: {order}: cpu seconds: qemu-img {min(theirs):.2f}, the command {min(ours):.2f} (ratio {ratio:.2f}), "
        f"check_image alone {min(inside):.2f}; {memory >> 10} MiB"
    )
    assert ratio < 1.5
    assert memory >> 10 < 48


@pytest.mark.slow
def test_a_full_terabyte_does_not_block_the_loop(tmp_path: Path) -> None:
    path = terabyte(tmp_path / "image.qed", "random")

    async def work() -> None:
        storage = FileStorage.open(path, False)
        head = bytearray(HEADER_BYTES)
        await storage.read_into(0, memoryview(head))
        async with breathing(0.1) as gaps:
            await check_image(storage, header_of(head))
        assert len(gaps) > 3  # the whole check takes about 0.1 s
        await storage.close()

    trio.run(work)
