"""Real tools discard and zero: nothing leaks, the host has its space back, and the rest reads as before.

In a run without the fast path the kernel finds no fallocate: tools that need it are refused, others write zeroes.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.judges.discards import (
    BELOW,
    HOLES,
    KIB,
    MIB,
    assert_nothing_leaked,
    assert_reads_as,
    cases,
    create,
    fill,
    flattened,
    make_twin,
    own_data,
    space,
)
from tests.helpers.mounts.acknowledging import punch
from tests.helpers.mounts.discard_deeds import DATA, DEEDS, FALLOCATES, SIZE
from tests.helpers.mounts.guests import (
    MKFS,
    checksums,
    filesystem,
    loop_device,
    make_tree,
    need_filesystem,
    need_guest,
    run,
)
from tests.helpers.mounts.mounts import mounted, need_fuse, wait_until

CLUSTERS = (4 * KIB, 16 * KIB, 64 * KIB, 512 * KIB, 2 * MIB)


# -- guests -----------------------------------------------------------------------------------------------------------

#: About as small as their mkfs makes them.
GUEST_SIZE = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}
#: How a guest's file system comes to discard what it has freed.
WAYS = {"fstrim": "nodiscard", "discard": "discard"}


def options_of(name: str, way: str) -> str:
    return "discard=sync" if (name, way) == ("btrfs", "discard") else WAYS[way]


def payload_of(cluster: int) -> int:
    """Bytes that come and go. With 4 KiB clusters the file must stay below 16 MiB."""
    return 6 * MIB if cluster == 4 * KIB else 24 * MIB


@pytest.mark.guest
@pytest.mark.parametrize(
    ("name", "way", "cluster", "below"),
    cases(
        [
            ("ext4", "fstrim", 64 * KIB, "none"),
            ("ext4", "discard", 4 * KIB, "raw"),
            ("ext4", "fstrim", 2 * MIB, "qcow2"),
            ("xfs", "discard", 64 * KIB, "qed"),
            ("xfs", "fstrim", 4 * KIB, "none"),
            ("btrfs", "fstrim", 16 * KIB, "qed"),
            ("btrfs", "discard", 512 * KIB, "none"),
        ],
        MKFS,
        WAYS,
        CLUSTERS,
        BELOW,
    ),
)
def test_files_that_are_deleted(tmp_path: Path, raw: Path, name: str, way: str, cluster: int, below: str) -> None:
    """Written, deleted, discarded. What is left is read again from QEMU's conversion."""
    need_guest(MKFS[name][0], "fstrim")
    need_filesystem(name)
    image = create(tmp_path / "disk.qed", GUEST_SIZE[name], cluster, below)
    payload = payload_of(cluster)
    guest = tmp_path / "guest"

    def freed() -> bool:
        """ext4 discards a while after it has committed, and xfs deletes a while after it has been told to."""
        run("sync", "-f", guest)
        if way == "fstrim":
            trim(guest)
        return not HOLES or filled - space(image) > payload - MIB - 3 * cluster

    with mounted(image, raw), loop_device(raw) as device:
        run(*MKFS[name], device)
        with filesystem(device, guest, "-o", options_of(name, way)):
            make_tree(guest / "kept", seed=1, files=12)
            write_files(guest / "victims", payload)
            run("sync", "-f", guest)
            filled = space(image)
            assert filled > payload
            run("rm", "-r", guest / "victims")
            wait_until(freed)
            (guest / "later").write_bytes(random.Random(2).randbytes(300_000))
            kept = checksums(guest)
    assert_nothing_leaked(image)
    if HOLES:
        assert filled - space(image) > payload - 2 * MIB - 3 * cluster
    with loop_device(flattened(image), "--read-only") as device, filesystem(device, guest, "-o", "ro"):
        assert checksums(guest) == kept


def write_files(directory: Path, size: int) -> None:
    """Half of it in one file, the rest in small ones."""
    directory.mkdir()
    rnd = random.Random(size)
    (directory / "large").write_bytes(rnd.randbytes(size // 2))
    for number in range(size // 2 // 50_000):
        (directory / f"small{number}").write_bytes(rnd.randbytes(50_000))


def trim(guest: Path) -> None:
    done = subprocess.run(["fstrim", str(guest)], capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == HOLES, done
    if not HOLES:
        assert "not supported" in done.stderr


@pytest.mark.guest
@pytest.mark.parametrize(
    ("name", "cluster", "below"),
    cases(
        [("ext4", 2 * MIB, "none"), ("xfs", 64 * KIB, "qcow2"), ("btrfs", 4 * KIB, "raw")],
        MKFS,
        CLUSTERS,
        BELOW,
    ),
)
def test_mkfs_on_a_disk_with_data(tmp_path: Path, raw: Path, name: str, cluster: int, below: str) -> None:
    """It discards the whole device first; old data, the backing file's included, is gone, and its space is back."""
    need_guest(MKFS[name][0])
    need_filesystem(name)
    image = create(tmp_path / "disk.qed", GUEST_SIZE[name], cluster, below)
    empty = space(image)
    guest, copy = tmp_path / "guest", tmp_path / "copy"
    with mounted(image, raw), loop_device(raw) as device:
        fill(raw, 0, payload_of(cluster))
        run(*MKFS[name], device)
        with filesystem(device, guest):
            make_tree(guest / "kept", seed=3, files=6)
            kept = checksums(guest)
        run("sync", raw)
        run("cp", "--sparse=always", raw, copy)
    assert_nothing_leaked(image)
    assert_reads_as(image, copy)
    if HOLES:
        zeroes = 2 * MIB if name == "btrfs" else 0  # which its mkfs writes at the begin
        assert space(image) - empty < space(copy) + zeroes + MIB
    with loop_device(flattened(image), "--read-only") as device, filesystem(device, guest, "-o", "ro"):
        assert checksums(guest) == kept


# -- tools on the raw file, or on a loop device over it ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "cluster", "below"),
    cases(
        [
            ("blkdiscard", 64 * KIB, "none"),
            ("blkdiscard", 2 * MIB, "qed"),
            ("blkdiscard-all", 16 * KIB, "raw"),
            ("blkdiscard-z", 64 * KIB, "qcow2"),
            ("blkdiscard-z", 4 * KIB, "none"),
            ("fallocate-p", 4 * KIB, "raw"),
            ("fallocate-p", 512 * KIB, "none"),
            ("fallocate-z", 64 * KIB, "qed"),
            ("fallocate-z-past-the-end", 16 * KIB, "none"),
            ("fallocate-d", 64 * KIB, "raw"),
            ("cp", 64 * KIB, "none"),
            ("cp", 2 * MIB, "qcow2"),
            ("dd", 4 * KIB, "qed"),
            ("dd", 512 * KIB, "none"),
            ("rsync", 64 * KIB, "none"),
            ("qemu-img", 16 * KIB, "qcow2"),
            ("truncate", 64 * KIB, "raw"),
        ],
        DEEDS,
        CLUSTERS,
        BELOW,
    ),
)
def test_as_on_a_plain_file(tmp_path: Path, raw: Path, deed: str, cluster: int, below: str) -> None:
    """A tool does the same to the raw file of a mount and to a plain one; then half of it is written again."""
    need_fuse()
    if deed.startswith("blkdiscard"):
        need_guest("blkdiscard")
    if deed == "rsync" and not shutil.which("rsync"):
        pytest.skip("rsync is not installed")
    if deed in FALLOCATES and not HOLES:
        pytest.skip("without the fast path there is no fallocate")
    image = create(tmp_path / "disk.qed", SIZE, cluster, below)
    empty = space(image)  # its L1 table: 8 MiB for clusters of 2 MiB
    twin = make_twin(image, SIZE)
    with mounted(image, raw):
        for path in (twin, raw):
            fill(path, *DATA)
            DEEDS[deed](path, tmp_path)
        run("sync", raw)
        assert raw.stat().st_size == twin.stat().st_size
    assert_nothing_leaked(image)
    assert_reads_as(image, twin)
    if HOLES:
        # What shares a cluster with new data was copied, and zeroed in pieces too small for a hole.
        copied = 0 if below == "none" else (2 if deed in FALLOCATES else 4) * cluster
        assert space(image) - empty <= own_data(twin, image) + copied + MIB // 2
    length = image.stat().st_size
    with mounted(image, raw):
        for path in (twin, raw):
            fill(path, DATA[0], DATA[1] // 2, seed=2)
    assert_nothing_leaked(image)
    assert_reads_as(image, twin)
    if deed in FALLOCATES:
        assert image.stat().st_size == length, "what was mapped is written in place"


# -- side by side -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["none", "raw"])
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_neighbours_in_a_cluster(tmp_path: Path, raw: Path, direct: bool, below: str) -> None:
    """Four threads, each with blocks of its own in every cluster, write and punch them: none hurts another's."""
    if not HOLES:
        pytest.skip("without the fast path there is no fallocate")
    need_fuse()
    block, size = 4 * KIB, 4 * MIB
    image = create(tmp_path / "disk.qed", size, 64 * KIB, below)
    twin = make_twin(image, size)

    def work(mine: int) -> dict[int, bytes]:
        rnd, last = random.Random(mine), {}
        fd = os.open(raw, os.O_RDWR | (os.O_DIRECT if direct else 0))
        with mmap.mmap(-1, block) as page:  # aligned, as O_DIRECT wants it
            for _ in range(800):
                place = rnd.randrange(mine, size // block, 4) * block
                if rnd.random() < 0.5:
                    page[:] = last[place] = rnd.randbytes(block)
                    assert os.pwritev(fd, [page], place) == block
                else:
                    punch(fd, place, block)
                    last[place] = bytes(block)
                if rnd.random() < 0.02:
                    os.fsync(fd)
        os.close(fd)
        return last

    with mounted(image, raw), ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    with twin.open("r+b", buffering=0) as file:
        for place, content in (item for last in results for item in last.items()):
            os.pwrite(file.fileno(), content, place)
    assert_nothing_leaked(image)
    assert_reads_as(image, twin)
