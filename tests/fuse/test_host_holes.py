"""Clusters that have a place in a QED image and are holes of its file: what was discarded or zeroed, or never written.

`map`, SEEK_DATA and SEEK_HOLE, `convert` and `info` see them as they are in the host's file system: by its blocks, also
inside a cluster, in every image of a chain, and at no cost to speak of, however many there are.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from qedfuse.chain.opening import open_image
from qedfuse.layers.mapping import map_image
from qedfuse.layers.runs import Kind
from tests.helpers.images.chains import run
from tests.helpers.images.host_holes import (
    CLUSTER,
    KIB,
    MIB,
    clusters_of,
    data_of,
    full_image,
    held,
    our_map,
    punch_guest,
    segments,
)
from tests.helpers.judges.seeking import next_data, next_hole
from tests.helpers.mounts.acknowledging import punch
from tests.helpers.mounts.guests import assert_clean, filesystem, need_guest
from tests.helpers.mounts.hosts import host_of
from tests.helpers.mounts.modes import MODES, NEEDS_NATIVE, Mode
from tests.helpers.mounts.mounts import mounted
from tests.helpers.qemu.cli import qedfuse, qemu_img, qemu_io


@pytest.fixture(params=["ext4", "xfs", "btrfs", "tmpfs"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system for images, with blocks of 4 KiB."""
    name: str = request.param
    if name == "tmpfs":
        need_guest()
        with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs", "-o", "huge=never") as point:
            yield point
        return
    with host_of(name, tmp_path / "disk", 400 * MIB) as point:
        yield point


# -- map, info, convert -----------------------------------------------------------------------------------------------


def test_map_info_and_convert(host: Path) -> None:
    """Whole clusters, several at a time, and a block inside of one; QEMU reads the same and finds nothing wrong."""
    image = full_image(host / "disk.qed", 4 * MIB)
    before = json.loads(qedfuse("info", "--output=json", image).out)["actual-size"]
    punch_guest(image, (0, CLUSTER), (MIB, MIB), (3 * MIB + 8 * KIB, 4 * KIB))
    expected = [(CLUSTER, MIB), (2 * MIB, 3 * MIB + 8 * KIB), (3 * MIB + 12 * KIB, 4 * MIB)]

    entries = our_map(image)
    assert data_of(entries) == expected
    places = clusters_of(image)
    for entry in entries:  # a hole has its place in the file, too, and hides what is below
        assert entry["present"] and entry["zero"] is not entry["data"] and entry["depth"] == 0
        assert entry["offset"] == places[entry["start"] // CLUSTER] + entry["start"] % CLUSTER
    shown = [line.split() for line in qedfuse("map", image).out.splitlines()[1:]]
    assert [(int(row[0], 16), int(row[0], 16) + int(row[1], 16)) for row in shown] == expected

    after = json.loads(qedfuse("info", "--output=json", image).out)["actual-size"]
    assert after == held(image) <= before - MIB - CLUSTER

    for target, options in ((host / "sparse", ()), (host / "whole", ("-S", "0")), (host / "copy.qed", ("-O", "qed"))):
        done = qedfuse("convert", *(options if "-O" in options else ("-O", "raw", *options)), image, target)
        assert done.code == 0, done
        assert "identical" in qemu_img("compare", image, target, "-f", "qed")
    assert data_of(json.loads(qemu_img("map", "-f", "raw", "--output=json", host / "sparse"))) == expected
    assert held(host / "whole") >= 4 * MIB
    assert_clean(host / "copy.qed")
    assert_clean(image)


def test_what_is_reserved_and_not_written_is_a_hole(host: Path) -> None:
    """An unwritten extent, as the host tells it of a raw file."""
    image = full_image(host / "disk.qed", 2 * MIB)
    place = clusters_of(image)[3]
    done = subprocess.run(
        ["fallocate", "--zero-range", "--offset", str(place), "--length", str(CLUSTER), str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "not supported" in done.stderr:
        pytest.skip("this host cannot reserve space in a file")
    assert done.returncode == 0, done
    theirs = json.loads(qemu_img("map", "-f", "raw", "--output=json", image))
    told = next(entry for entry in theirs if entry["start"] <= place < entry["start"] + entry["length"])
    ours = next(entry for entry in our_map(image) if entry["start"] <= 3 * CLUSTER < entry["start"] + entry["length"])
    assert (ours["data"], ours["zero"]) == (told["data"], told["zero"])


def test_in_every_image_of_a_chain(tmp_path: Path) -> None:
    """A hole of the middle hides the base; where nothing is mapped the base's own holes show."""
    base = full_image(tmp_path / "base.qed", 4 * MIB)
    middle = full_image(tmp_path / "middle.qed", MIB, "-b", str(base), "-F", "qed", pattern=6)
    top = tmp_path / "top.qed"
    qemu_img("create", "-q", "-f", "qed", "-b", middle, "-F", "qed", top, str(4 * MIB))
    qemu_io(top, "write -P 7 0 128k")
    punch_guest(base, (0, MIB), (2 * MIB, MIB))
    punch_guest(middle, (CLUSTER, 2 * CLUSTER), (512 * KIB, 4 * KIB))
    entries = our_map(top)
    assert data_of(entries) == [(0, 2 * CLUSTER), (3 * CLUSTER, 512 * KIB), (516 * KIB, MIB)]
    assert {entry["depth"] for entry in entries if entry["present"]} == {0, 1}
    entries = our_map(middle)
    assert data_of(entries) == [(0, CLUSTER), (3 * CLUSTER, 512 * KIB), (516 * KIB, MIB)]
    entries = our_map(base)
    assert data_of(entries) == [(MIB, 2 * MIB), (3 * MIB, 4 * MIB)]
    overlay = tmp_path / "overlay.qed"
    qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "qed", overlay)
    assert data_of(our_map(overlay)) == [(MIB, 2 * MIB), (3 * MIB, 4 * MIB)]
    assert {entry["depth"] for entry in our_map(overlay)} == {1}
    assert qedfuse("convert", "-O", "raw", overlay, tmp_path / "flat").code == 0
    assert held(tmp_path / "flat") <= 2 * MIB + CLUSTER
    assert "identical" in qemu_img("compare", overlay, tmp_path / "flat")


def test_over_a_backing_file_convert_skips_what_both_lack(tmp_path: Path) -> None:
    base = full_image(tmp_path / "base.qed", 4 * MIB)
    image = full_image(tmp_path / "disk.qed", 4 * MIB, pattern=9)
    punch_guest(base, (0, 2 * MIB))
    punch_guest(image, (MIB, 2 * MIB))
    target = tmp_path / "target.qed"
    done = qedfuse("convert", "-O", "qed", "-B", base, "-F", "qed", image, target)
    assert done.code == 0, done
    assert "identical" in qemu_img("compare", image, target)
    entries = [(entry["depth"], entry["start"], entry["length"]) for entry in our_map(target) if entry["data"]]
    assert entries == [(0, 0, MIB), (0, 3 * MIB, MIB)]
    assert_clean(target)


@pytest.mark.parametrize("seed", range(3))
def test_at_random(tmp_path: Path, seed: int) -> None:
    """Clusters in any order in the file, holes of any number of blocks: found by map and by seeking, wherever from."""
    rnd = random.Random(seed)
    size, cluster = 2 * MIB, rnd.choice([4 * KIB, 64 * KIB, 1 * MIB])
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", "-o", f"cluster_size={cluster}", path, str(size))
    order = list(range(size // cluster))
    rnd.shuffle(order)
    written = order[: len(order) * 3 // 4 + 1]
    qemu_io(path, *(f"write -P 1 {number * cluster} {cluster}" for number in written))
    data = {number * cluster + at for number in written for at in range(0, cluster, 4 * KIB)}

    async def punch_some() -> None:
        async with open_image(path, read_only=True) as image:
            with path.open("r+b") as file:
                for _ in range(80):
                    block = rnd.choice(sorted(data)) if data else 0
                    for at in range(block, min(size, block + rnd.choice([1, 2, 5]) * 4 * KIB), 4 * KIB):
                        (run_,) = await image.map(at, 4 * KIB)
                        if run_.kind is Kind.DATA:
                            punch(file.fileno(), run_.host, 4 * KIB)
                            data.discard(at)

    async def check() -> None:
        async with open_image(path, read_only=True) as image:
            async with aclosing(map_image(image)) as entries:
                found = {
                    at
                    async for entry in entries
                    if entry.data
                    for at in range(entry.start, entry.start + entry.length, 4 * KIB)
                }
            assert found == data
            content = bytes(await image.read(0, size))
            assert all(content[at : at + 4 * KIB] == b"\1" * 4 * KIB for at in data)
            for offset in rnd.sample(range(size), 200):
                inside = offset & -4 * KIB in data
                after = min((at for at in data if at > offset), default=None)
                assert await next_data(image, offset) == (offset if inside else after)
                position = offset
                while position < size and position & -4 * KIB in data:
                    position = (position & -4 * KIB) + 4 * KIB
                assert await next_hole(image, offset) == position

    run(punch_some)
    run(check)


# -- at the mount -----------------------------------------------------------------------------------------------------


@MODES
def test_st_blocks_and_the_tools_that_trust_them(host: Path, tmp_path: Path, raw: Path, mode: Mode) -> None:
    image = full_image(host / "disk.qed", 16 * MIB)
    punch_guest(image, (2 * MIB, 12 * MIB), (15 * MIB + 4 * KIB, 8 * KIB))
    with mounted(*mode, "--ro", image, raw):
        assert held(raw) == held(image) < 6 * MIB
        assert int(subprocess.check_output(["du", "-B1", raw]).split()[0]) == held(image)
        copies = [host / "copy", host / "unpacked" / raw.name]
        subprocess.run(["cp", "--sparse=auto", raw, copies[0]], check=True, timeout=60)
        subprocess.run(["tar", "-C", raw.parent, "--sparse", "-cf", host / "x.tar", raw.name], check=True, timeout=60)
        copies[1].parent.mkdir()
        subprocess.run(["tar", "-C", copies[1].parent, "-xf", host / "x.tar"], check=True, timeout=60)
        for copy in copies:
            subprocess.run(["cmp", raw, copy], check=True, timeout=60)
            assert "identical" in qemu_img("compare", "-f", "qed", "-F", "raw", image, copy)


@NEEDS_NATIVE[0]
@NEEDS_NATIVE[1]
@NEEDS_NATIVE[2]
@pytest.mark.parametrize("options", [(), ("-o", "direct_io")], ids=["cached", "direct_io"])
def test_seeking_through_a_mount(host: Path, raw: Path, options: tuple[str, ...]) -> None:
    """Holes by blocks; what is written into one, in place, is no hole any more, whatever was found before."""
    image = full_image(host / "disk.qed", 16 * MIB)
    punch_guest(image, (2 * MIB, 12 * MIB), (15 * MIB + 4 * KIB, 8 * KIB))
    end = [(14 * MIB, 15 * MIB + 4 * KIB), (15 * MIB + 12 * KIB, 16 * MIB)]
    with mounted(*options, image, raw):
        fd = os.open(raw, os.O_RDWR)
        try:
            assert segments(fd) == [(0, 2 * MIB), *end]
            assert os.lseek(fd, 2 * MIB + 5, os.SEEK_HOLE) == 2 * MIB + 5
            for number in range(3, 6):
                block = number * MIB + number * 4 * KIB
                assert os.lseek(fd, block - MIB // 2, os.SEEK_DATA) == 14 * MIB
                assert os.lseek(fd, block, os.SEEK_HOLE) == block
                os.pwrite(fd, b"x" * 4 * KIB, block)
                assert os.lseek(fd, block - MIB // 2, os.SEEK_DATA) == block
                assert os.lseek(fd, block, os.SEEK_HOLE) == block + 4 * KIB
                punch(fd, block & -CLUSTER, CLUSTER)
                assert os.lseek(fd, block - MIB // 2, os.SEEK_DATA) == 14 * MIB
            os.pwrite(fd, b"y" * MIB, 4 * MIB)
            assert segments(fd) == [(0, 2 * MIB), (4 * MIB, 5 * MIB), *end]
        finally:
            os.close(fd)
