"""Leaks in real images: counted as qemu-img counts them, and really cured, with real tools as the judges."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qedfuse.check.check import Repair
from qedfuse.qed.header import FEATURE_NEED_CHECK
from tests.helpers.images.leaky import drop, expect_cured, flat, header, swap_l1_to_the_end, tables_of
from tests.helpers.judges.check_tools import check_file, cli, qemu_check
from tests.helpers.mounts.guests import filesystem, need_guest
from tests.helpers.qemu.cli import tool

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def image_of(
    path: Path, cluster: int, table: int, rng: random.Random, *, size: int, writes: int, backing: bool = False
) -> Path:
    """An image by QEMU with writes all over it, each of up to four clusters, in any order."""
    words = ["qemu-img", "create", "-q", "-f", "qed", "-o", f"cluster_size={cluster},table_size={table}"]
    if backing:
        base = path.with_suffix(".base")
        base.write_bytes(rng.randbytes(MIB) * (size // MIB))
        words += ["-b", base.name, "-F", "raw"]
    tool(*words, path, size)
    deeds: list[str] = []
    for _ in range(writes):
        length = min(rng.randint(1, 4 * cluster) // 512 * 512 or 512, 3 * MIB)
        deeds += ["-c", f"write -P {rng.randrange(1, 255)} {rng.randrange(0, size - length, 512)} {length}"]
    tool("qemu-io", "-f", "qed", *deeds, path)
    return path


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "overlay"])
@pytest.mark.parametrize(
    ("cluster", "table", "size"),
    [
        (4 * KIB, 2, 24 * MIB),
        (4 * KIB, 4, 40 * MIB),
        (4 * KIB, 16, 96 * MIB),
        (64 * KIB, 2, 96 * MIB),
        (64 * KIB, 4, 96 * MIB),
        (64 * KIB, 16, 96 * MIB),
        (2 * MIB, 2, 256 * MIB),
        (2 * MIB, 4, 256 * MIB),
    ],
)
def test_random_leaks(cluster: int, table: int, size: int, backing: bool, tmp_path: Path) -> None:
    rng = random.Random(f"{cluster} {table} {backing}")
    path = image_of(tmp_path / "image.qed", cluster, table, rng, size=size, writes=120, backing=backing)
    lost = min(2, len(tables_of(path)[1]) - 1)
    leaks = drop(path, rng, rng.choice((0.1, 0.4, 0.8)), tables=lost)
    expect_cured(path, leaks, flat(path))


@pytest.mark.parametrize("part", [0.0, 0.02, 1.0])
def test_a_lost_table_in_the_middle(part: float, tmp_path: Path) -> None:
    """With all that it maps, and a few of the others' clusters, or all."""
    rng = random.Random(5)
    path = image_of(tmp_path / "image.qed", 4 * KIB, 4, rng, size=64 * MIB, writes=200)
    tables = len(tables_of(path)[1])
    leaks = drop(path, rng, part, tables=tables // 3)
    expect_cured(path, leaks, flat(path))


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_the_l1_table_at_the_end(part: float, tmp_path: Path) -> None:
    rng = random.Random(6)
    path = image_of(tmp_path / "image.qed", 4 * KIB, 2, rng, size=24 * MIB, writes=60)
    leaks = swap_l1_to_the_end(path) + drop(path, rng, part)
    expect_cured(path, leaks, flat(path))


def test_what_is_counted(tmp_path: Path) -> None:
    """Holes as well as data, at the end as in the middle; not a last part of a cluster, nor the header."""
    path = tmp_path / "image.qed"
    tool("qemu-img", "create", "-q", "-f", "qed", "-o", "cluster_size=4k,table_size=2", path, "64M")
    tool("qemu-io", "-f", "qed", "-c", "write -P 7 0 40k", path)
    size = path.stat().st_size
    for more in (0, 512, 4095, 4096, 4097, 8191, 12288, 409600):
        os.truncate(path, size + more)
        code, theirs = qemu_check(path)
        done = cli("--output=json", path)
        assert (done.returncode, json.loads(done.stdout)["leaks"]) == (code, theirs.get("leaks", 0)), more
        assert theirs.get("leaks", 0) == (more + 511) // 4096, "a last part of a sector counts as one"
    leaks = drop(path, random.Random(1), 0.5)
    assert qemu_check(path)[1]["leaks"] == check_file(path).leaks == leaks + 100
    done = cli("--output=json", "-r", "leaks", path)
    result = json.loads(done.stdout)
    assert (done.returncode, result["leaks"], result["leaks-fixed"]) == (0, 0, leaks + 100)
    assert result["image-end-offset"] == path.stat().st_size == size - leaks * 4096
    assert "punched-clusters" not in result


def test_opening_after_a_crash_moves_nothing(tmp_path: Path) -> None:
    """A mount must not take minutes: only the end is cut off, and the space of the rest goes back to the host."""
    rng = random.Random(8)
    path = image_of(tmp_path / "image.qed", 64 * KIB, 4, rng, size=64 * MIB, writes=100)
    leaks = drop(path, rng, 0.5)
    copy = flat(path)
    head = header(path)
    with path.open("r+b") as file:
        file.write(head.with_feature(FEATURE_NEED_CHECK, True).encode())
    before, tables, held = path.stat().st_size, tables_of(path), path.stat().st_blocks
    result = check_file(path, Repair.CRASH)
    assert tables_of(path) == tables
    assert result.leaks == leaks - result.leaks_fixed == leaks - (before - path.stat().st_size) // head.cluster_size > 0
    assert not header(path).needs_check
    assert path.stat().st_blocks < held
    expect_cured(path, result.leaks, copy)


SCRIPT = (
    "import sys; from qedfuse.check import gap_filling; gap_filling.BATCH_CLUSTERS = 50; "
    "from qedfuse.cli.main import main; sys.exit(main(['check', '-r', 'leaks', sys.argv[1]]))"
)


def test_killed_on_the_way(tmp_path: Path) -> None:
    """Wherever it happens: the image reads as before, QEMU finds no corruption, and the next repair finishes."""
    rng = random.Random(9)
    path = image_of(tmp_path / "image.qed", 4 * KIB, 2, rng, size=60 * MIB, writes=1500)
    leaks = drop(path, rng, 0.4, tables=3)
    copy, size = flat(path), path.stat().st_size
    killed = 0
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, path], stdout=subprocess.DEVNULL)
        while child.poll() is None and path.stat().st_size == size:  # (the first batch cuts something off)
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        child.send_signal(signal.SIGKILL)
        killed += child.wait(timeout=60) == -signal.SIGKILL
        size = path.stat().st_size
        code, theirs = qemu_check(path)
        assert code in (0, 3) and "corruptions" not in theirs
        tool("qemu-img", "compare", "-f", "qed", "-F", "raw", path, copy)
    assert killed, leaks
    assert cli("-r", "leaks", path).returncode == qemu_check(path)[0] == 0
    tool("qemu-img", "compare", "-f", "qed", "-F", "raw", path, copy)


@pytest.mark.parametrize("room", [0, 3])
def test_a_full_host(room: int, tmp_path: Path) -> None:
    """Leaked clusters that are holes: filling them takes room, little at a time. Without any, nothing is changed."""
    need_guest()
    rng = random.Random(10)
    with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs", "-o", f"size={16 * MIB}") as host:
        path = image_of(tmp_path / "image.qed", 64 * KIB, 2, rng, size=64 * MIB, writes=60)
        leaks = drop(path, rng, 0.3)
        copy = flat(path)
        used = {value for entries in tables_of(path)[1].values() for value in entries}
        used |= {*range(64 * KIB, 3 * 64 * KIB, 64 * KIB), 0}
        used |= {offset + part * 64 * KIB for offset in tables_of(path)[0] if offset for part in range(2)}
        small = host / "image.qed"
        with path.open("rb") as source, small.open("wb") as target:  # (the leaked ones as holes)
            for offset in sorted(used):
                source.seek(offset)
                target.seek(offset)
                target.write(source.read(64 * KIB))
            target.truncate(path.stat().st_size)
        with (host / "ballast").open("wb") as ballast:
            state = os.statvfs(host)
            ballast.write(bytes(max(0, state.f_bavail * state.f_bsize - room * 64 * KIB)))
        before = small.read_bytes()
        done = cli("-r", "leaks", small)
        if room:
            assert done.returncode == qemu_check(small)[0] == 0, done.stderr
            assert small.stat().st_size == len(before) - leaks * 64 * KIB
        else:
            assert done.returncode == 1 and "no space left" in done.stderr
            assert done.stderr.count("\n") == 1
        tool("qemu-img", "compare", "-f", "qed", "-F", "raw", small, copy)
