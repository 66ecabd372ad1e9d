"""Conversions in place from qcow2 at the host's limits: a full file system, time and memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from qedfuse.cli.main import main
from tests.helpers.images.qcow2_in_place import expect_qed
from tests.helpers.judges.check_tools import check_file
from tests.helpers.mounts.guests import filesystem, need_guest
from tests.helpers.qemu.cli import environment, one_line, qedfuse, qemu_img, qemu_io

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.guest
def test_no_space(tmp_path: Path) -> None:
    """For unpacked clusters: nothing is changed. For all but what a repair moves: it gets by."""
    need_guest("mount")
    raw = tmp_path / "disk"
    raw.write_bytes(b"".join(random.Random(seed).randbytes(100) * 41 for seed in range(2000))[: 8 * MIB])
    with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs", "-o", f"size={16 * MIB}") as host:
        image, before = host / "a.qcow2", tmp_path / "before"
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, image)
        before.write_bytes(image.read_bytes())
        with (host / "ballast").open("wb") as file:
            file.write(bytes(11 * MIB))
        one_line(qedfuse("convert", "--in-place", "-O", "qed", image), 1, "no space left", f"{image} is unchanged")
        assert image.read_bytes() == before.read_bytes()
        assert sorted(os.listdir(host)) == ["a.qcow2", "ballast"]
        with (host / "ballast").open("r+b") as file:
            file.truncate(3 * MIB)
        assert main(["convert", "--in-place", "-O", "qed", str(image)]) == 0
        expect_qed(image, before)


#: Runs the command, and prints seconds and the most memory (MiB) that it had.
_MEASURED = """
import resource, sys, time
from qedfuse.cli.main import main
start = time.monotonic()
code = main(sys.argv[1:])
print(time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("size", "cluster_size"), [(100 * GIB, "64k"), (1024 * GIB, "64k"), (12 * GIB, "4k")])
def test_every_cluster_allocated(tmp_path: Path, size: int, cluster_size: str) -> None:
    """By the entries, not by the bytes, most of which are a hole of the host."""
    image = tmp_path / "a.qcow2"
    options = f"cluster_size={cluster_size},preallocation=metadata"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, size)
    places = [cluster << 16 for cluster in random.Random(1).sample(range(size >> 16), 50)]
    qemu_io(image, *[f"write -P {number + 1} {place} 64k" for number, place in enumerate(places)], format="qcow2")
    subprocess.run(["sync", image], check=True)
    command = [sys.executable, "-c", _MEASURED, "convert", "--in-place", "-f", "qcow2", "-O", "qed", str(image)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=True)
    seconds, memory = map(float, done.stdout.split())
    print(
        f"figures: qcow2 of {size >> 30} GiB, all {size // (int(cluster_size[:-1]) << 10)} clusters allocated: "
        f"{seconds:.2f} s, {memory:.0f} MiB of memory"
    )
    assert memory < 96
    found = check_file(image)
    assert (found.corruptions, found.leaks) == (0, 0)
    qemu_io(image, *[f"read -P {number + 1} {place} 64k" for number, place in enumerate(places)])
