"""Real guests on real mounts: partitions, file systems, fio, and the tools that people point at a raw file."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.mounts.guests import (
    MKFS,
    assert_clean,
    checksums,
    filesystem,
    loop_device,
    make_tree,
    need_filesystem,
    need_guest,
    run,
)
from tests.helpers.mounts.mounts import mounted

MIB = 1 << 20


def create(path: Path, size: str, *, cluster: str = "64k", backing: Path | None = None) -> Path:
    overlay = ["-b", str(backing), "-F", "raw"] if backing else []
    run("qemu-img", "create", "-q", "-f", "qed", "-o", f"cluster_size={cluster}", *overlay, path, size)
    return path


@pytest.mark.guest
@pytest.mark.parametrize("name", sorted(MKFS))
@pytest.mark.parametrize("overlay", [False, True], ids=["plain", "overlay"])
def test_a_partitioned_guest_survives_a_remount(tmp_path: Path, name: str, overlay: bool) -> None:
    need_guest(MKFS[name][0], "sfdisk")
    need_filesystem(name)
    backing = None
    if overlay:
        backing = tmp_path / "base.raw"
        backing.write_bytes(random.Random(5).randbytes(3 * MIB))  # old bytes that must not shine through a mkfs
    image = create(tmp_path / "disk.qed", "640M", backing=backing)
    raw, guest = tmp_path / "disk.raw", tmp_path / "guest"
    raw.touch()
    with mounted(image, raw):
        subprocess.run(["sfdisk", "-q", str(raw)], input="1M,560M,L\n,,L\n", text=True, check=True, capture_output=True)
        with loop_device(raw) as loop:
            run(*MKFS[name], f"{loop}p1")
            with filesystem(Path(f"{loop}p1"), guest):
                make_tree(guest, seed=1)
                before = checksums(guest)
    assert_clean(image)
    with mounted(image, raw), loop_device(raw) as loop:
        with filesystem(Path(f"{loop}p1"), guest):
            assert checksums(guest) == before
            make_tree(guest / "again", seed=2, files=40)
            before = checksums(guest)
        with filesystem(Path(f"{loop}p1"), guest, "-o", "ro"):
            assert checksums(guest) == before
    assert_clean(image)
    # QEMU's word for it: the same guest in QEMU's own conversion.
    flat = tmp_path / "flat.raw"
    run("qemu-img", "convert", "-f", "qed", "-O", "raw", image, flat)
    with loop_device(flat, "--read-only") as loop, filesystem(Path(f"{loop}p1"), guest, "-o", "ro"):
        assert checksums(guest) == before


@pytest.mark.parametrize("cluster", ["4k", "64k", "2M"])
@pytest.mark.parametrize("engine", ["psync", "libaio"])
def test_fio_verifies_across_a_remount(tmp_path: Path, cluster: str, engine: str) -> None:
    backing = tmp_path / "base.raw"
    backing.write_bytes(random.Random(7).randbytes(20 * MIB))
    image = create(tmp_path / "disk.qed", "64M", cluster=cluster, backing=backing)
    raw = tmp_path / "disk.raw"
    raw.touch()
    job = [
        "fio",
        "--name=verify",
        f"--filename={raw}",
        f"--ioengine={engine}",
        "--iodepth=8",
        f"--direct={int(engine == 'libaio')}",
        "--rw=randwrite",
        "--bsrange=4k-128k",
        "--size=64M",
        "--verify=crc32c",
        "--randseed=11",
        "--allow_file_create=0",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--output=/dev/null",
    ]
    with mounted(image, raw):
        run(*job, "--do_verify=1")
    assert_clean(image)
    with mounted(image, raw):
        run(*job, "--verify_only")
    assert_clean(image)


def test_common_tools_agree(tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qed", "48M")
    raw = tmp_path / "disk.raw"
    raw.touch()
    content = random.Random(3).randbytes(48 * MIB)
    source = tmp_path / "source"
    source.write_bytes(content)
    with mounted(image, raw):
        run("dd", f"if={source}", f"of={raw}", "bs=1M", "conv=notrunc,fsync")
        run("cmp", source, raw)
        copy = tmp_path / "copy"
        run("cp", raw, copy)
        run("cmp", source, copy)
        changed = content[: 5 * MIB] + os.urandom(10_000) + content[5 * MIB + 10_000 :]
        source.write_bytes(changed)
        run("rsync", "--inplace", "--no-whole-file", "--ignore-times", source, raw)
        run("cmp", source, raw)
        with raw.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            assert view[5 * MIB - 10 : 5 * MIB + 20_000] == changed[5 * MIB - 10 : 5 * MIB + 20_000]
            assert view[-4096:] == changed[-4096:]
        with raw.open("r+b") as changing, mmap.mmap(changing.fileno(), 0) as view:
            view[123_456:123_460] = b"mmap"
            view.flush()
        changed = changed[:123_456] + b"mmap" + changed[123_460:]
    assert_clean(image)
    flat = tmp_path / "flat.raw"
    run("qemu-img", "convert", "-f", "qed", "-O", "raw", image, flat)
    assert flat.read_bytes() == changed


def test_four_writers_at_once(tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qed", "64M", cluster="64k")
    raw = tmp_path / "disk.raw"
    raw.touch()
    block = 12_288  # no multiple of the cluster size: writers meet inside clusters

    def write(writer: int) -> None:
        rnd = random.Random(writer)
        with raw.open("r+b", buffering=0) as file:
            for number in rnd.sample(range(writer, 4000, 4), 700):
                os.pwrite(file.fileno(), bytes([number % 251 + 1]) * block, number * block)
            os.fsync(file.fileno())

    with mounted(image, raw), ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert_clean(image)
    expected = bytearray(64 * MIB)
    for writer in range(4):
        for number in random.Random(writer).sample(range(writer, 4000, 4), 700):
            expected[number * block : (number + 1) * block] = bytes([number % 251 + 1]) * block
    flat = tmp_path / "flat.raw"
    run("qemu-img", "convert", "-f", "qed", "-O", "raw", image, flat)
    assert flat.read_bytes() == bytes(expected)
