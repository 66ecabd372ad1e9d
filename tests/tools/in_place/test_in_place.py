"""`qedfuse convert --in-place` between raw and QED: the guest's bytes stay, where they are; QEMU is the judge."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedfuse.cli.main import main
from qedfuse.errors import QedfuseError
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import Header
from qedfuse.qed.new_image import qemu_objection
from qedfuse.sizes import round_up
from qedfuse.tools.in_place.plan import Wanted
from qedfuse.tools.in_place.raw_to_qed import MAX_TABLE_BYTES, choose_geometry
from tests.helpers.images.conversions import MIB, scatter, usage
from tests.helpers.mounts.guests import assert_clean
from tests.helpers.qemu.cli import ROOT, environment, new_image, one_line, qedfuse_inside, qemu_img, qemu_io

GIB, TIB = 1 << 30, 1 << 40


def in_place(path: Path, *words: object) -> None:
    """It must succeed."""
    assert main(["convert", "--in-place", *map(str, words), str(path)]) == 0
    assert os.listdir(path.parent).count(path.name + ".qedfuse-journal") == 0


def sparse_disk(path: Path, size: int, seed: int) -> bytes:
    """A raw disk with data here and there, at its start and at its end. Returns its content."""
    rnd = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for offset in [0, max(0, size - 700), *(rnd.randrange(size) for _ in range(8))]:
            file.seek(offset)
            file.write(rnd.randbytes(min(rnd.choice([1, 512, 5000, 70_000]), size - offset)))
    return path.read_bytes()


# -- what it becomes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [
        (512, Wanted(), Geometry(65536, 4)),
        (512 * GIB, Wanted(), Geometry(65536, 4)),
        (512 * GIB + 512, Wanted(), Geometry(131072, 4)),
        (4 * TIB, Wanted(), Geometry(512 << 10, 4)),
        (16 * TIB, Wanted(), Geometry(2 * MIB, 4)),
        (32 * TIB, Wanted(), Geometry(4 * MIB, 2)),
        (64 * TIB, Wanted(), Geometry(4 * MIB, 2)),
        (4096 * TIB, Wanted(), Geometry(4 * MIB, 2)),
        (64 * TIB, Wanted(cluster_size=8 * MIB), Geometry(8 * MIB, 4)),
        (TIB, Wanted(cluster_size=65536), Geometry(65536, 4)),
        (GIB, Wanted(cluster_size=4096), Geometry(4096, 4)),
        (100 * GIB, Wanted(cluster_size=4096), Geometry(4096, 16)),
        (200 * GIB, Wanted(table_size=1), Geometry(65536, 1)),
        (5 * TIB, Wanted(table_size=1), Geometry(MIB, 1)),
        (TIB, Wanted(65536, 2), Geometry(65536, 2)),
    ],
)
def test_which_geometry(size: int, wanted: Wanted, expected: Geometry) -> None:
    found = choose_geometry(size, wanted, "disk")
    assert found == expected
    assert found.max_image_size >= size
    if wanted == Wanted():
        assert qemu_objection(found, size) is None
    if wanted == Wanted() and size <= 32 * TIB:
        assert found.clusters_for(size) * 8 <= MAX_TABLE_BYTES


@pytest.mark.parametrize(
    ("size", "wanted", "hint"),
    [
        (TIB, Wanted(cluster_size=4096), "cluster_size=131072,table_size=4 can"),
        (2 * GIB, Wanted(4096, 1), "cluster_size=65536,table_size=4 can"),
    ],
)
def test_which_geometry_cannot_be(size: int, wanted: Wanted, hint: str) -> None:
    with pytest.raises(QedfuseError, match=hint):
        choose_geometry(size, wanted, "disk")


@pytest.mark.parametrize("size", [512, 4096, 65_024, 65_536, 66_048, 3 * MIB + 512])
@pytest.mark.parametrize(("cluster", "table"), [(4096, 2), (65536, 4), (2 * MIB, 2)])
def test_there_and_back(tmp_path: Path, size: int, cluster: int, table: int) -> None:
    path, plain = tmp_path / "disk", tmp_path / "plain"
    content = sparse_disk(path, size, seed=size)
    plain.write_bytes(content)
    status, before = path.stat(), usage(path)
    in_place(path, "-O", "qed", "-o", f"cluster_size={cluster},table_size={table}")
    assert path.stat().st_ino == status.st_ino and path.stat().st_mode == status.st_mode
    assert_clean(path)
    qemu_img("compare", "-f", "qed", "-F", "raw", path, plain)
    header = Header.decode(path.read_bytes()[:64], "disk")
    clusters = -(-size // cluster)
    assert path.stat().st_size == round_up(size, cluster) + cluster * (
        1 + table * (1 + -(-clusters * 8 // (table * cluster)))
    )
    assert header.image_size == size and header.geometry == Geometry(cluster, table)
    with path.open("rb") as file:  # all but the first cluster is where it was, and of that nothing is left there
        assert file.read(cluster)[64:].count(0) == cluster - 64
        assert file.read(max(0, size - cluster)) == content[cluster:]
    assert usage(path) <= before + (path.stat().st_size - size) + cluster
    in_place(path)
    assert path.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["disk", "plain"]


def test_holes_need_no_allocation_later(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    sparse_disk(path, 4 * MIB, seed=1)
    in_place(path, "-O", "qed")
    size = path.stat().st_size
    qemu_io(path, "write -P 1 1M 3M")
    assert path.stat().st_size == size
    assert_clean(path)


def test_unused_tables_take_no_data(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(10 * GIB)
    in_place(path, "-O", "qed")
    assert path.stat().st_size < 10 * GIB + 4 * MIB
    assert path.stat().st_blocks * 512 < 4 * MIB
    in_place(path)
    assert path.stat().st_size == 10 * GIB and path.stat().st_blocks * 512 < MIB


# -- back, after it has been used --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", ["4k", "64k", "1M"])
def test_back_after_writes(tmp_path: Path, cluster: str) -> None:
    path, flat = tmp_path / "disk", tmp_path / "flat"
    sparse_disk(path, 6 * MIB, seed=2)
    in_place(path, "-O", "qed", "-o", f"cluster_size={cluster}")
    scatter(path, "qed", 6 * MIB, seed=3)
    qemu_img("convert", "-f", "qed", "-O", "raw", path, flat)
    in_place(path)
    assert path.read_bytes() == flat.read_bytes()


@pytest.mark.parametrize("cluster", ["4k", "64k"])
def test_back_after_it_has_grown(tmp_path: Path, cluster: str) -> None:
    """What is behind the old end lies where it was allocated, and tables lie where the disk is now: all of it moves."""
    path, flat = tmp_path / "disk", tmp_path / "flat"
    sparse_disk(path, 3 * MIB, seed=4)
    in_place(path, "-O", "qed", "-o", f"cluster_size={cluster},table_size=4")
    qemu_img("resize", "-f", "qed", path, "9M")
    scatter(path, "qed", 9 * MIB, seed=5)
    qemu_img("convert", "-f", "qed", "-O", "raw", path, flat)
    in_place(path, "-f", "qed", "-O", "raw")
    assert path.read_bytes() == flat.read_bytes()


@pytest.mark.parametrize(
    "geometry", ["cluster_size=4k,table_size=2", "cluster_size=64k", "cluster_size=64k,table_size=1"]
)
def test_an_image_of_any_order(tmp_path: Path, geometry: str) -> None:
    path, flat = tmp_path / "disk.qed", tmp_path / "flat"
    assert qedfuse_inside("create", "-o", geometry, path, "7M").code == 0
    if "table_size=1" in geometry:  # QEMU cannot open those
        content = sparse_disk(flat, 7 * MIB, seed=6)
        assert main(["convert", "-n", "-O", "qed", str(flat), str(path)]) == 0
    else:
        scatter(path, "qed", 7 * MIB, seed=6)
        qemu_img("convert", "-f", "qed", "-O", "raw", path, flat)
        content = flat.read_bytes()
    in_place(path)
    assert path.read_bytes() == content
    in_place(path, "-O", "qed")
    assert_clean(path)
    qemu_img("compare", "-f", "qed", "-F", "raw", path, flat)


def test_leaked_data_does_not_show(tmp_path: Path) -> None:
    """A cluster that nothing refers to, where the guest sees zeroes."""
    path = new_image(tmp_path / "disk.qed", "4M", "-o", "cluster_size=64k")
    qemu_io(path, "write -P 7 0 64k")
    with path.open("r+b") as file:
        file.truncate(40 * 65536)
        file.seek(30 * 65536)
        file.write(b"leaked" * 1000)
    in_place(path)
    content = path.read_bytes()
    assert content == b"\7" * 65536 + bytes(len(content) - 65536) and len(content) == 4 * MIB


def test_the_guest_begins_like_another_format(tmp_path: Path) -> None:
    path = new_image(tmp_path / "disk", "2M", fill=7)
    content = path.read_bytes().ljust(3 * MIB, b"\0")
    path.write_bytes(content)
    one_line(
        qedfuse_inside("convert", "--in-place", "-O", "qed", path), 1, "is a qed image already", f"{path} is unchanged"
    )
    in_place(path, "-f", "raw", "-O", "qed")
    assert_clean(path)
    done = qedfuse_inside("convert", "--in-place", path)
    assert done.code == 0 and "begins like a qed image" in done.err and "-f raw" in done.err
    assert path.read_bytes() == content


def test_the_example(tmp_path: Path) -> None:
    more = environment({"QEDFUSE": f"{sys.executable} -m qedfuse", "TMPDIR": str(tmp_path)})
    command = [ROOT / "examples" / "move_in_in_place.sh"]
    done = subprocess.run(command, env=more, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No errors were found" in done.stdout and "Images are identical." in done.stdout
    assert done.stdout.endswith("done: the same disk, byte for byte\n")
    assert os.listdir(tmp_path) == []


@settings(max_examples=10, deadline=None)
@given(
    size=st.integers(1, 4000).map(lambda sectors: 512 * sectors),
    geometry=st.tuples(st.sampled_from([4096, 8192, 65536]), st.sampled_from([2, 4, 16])),
    seed=st.integers(0, 1 << 32),
    grows=st.booleans(),
    data=st.data(),
)
def test_any_disk(size: int, geometry: tuple[int, int], seed: int, grows: bool, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path, flat = Path(directory, "disk"), Path(directory, "flat")
        sparse_disk(path, size, seed)
        in_place(path, "-f", "raw", "-O", "qed", "-o", "cluster_size={},table_size={}".format(*geometry))
        if grows:
            size += 512 * data.draw(st.integers(1, 2000))
            qemu_img("resize", "-q", "-f", "qed", path, size)
        writes = []
        for number in range(data.draw(st.integers(0, 6))):
            offset = 512 * data.draw(st.integers(0, size // 512 - 1))
            length = min(512 * data.draw(st.integers(1, 400)), size - offset)
            what = data.draw(st.sampled_from([f"write -P {number + 1}", "write -z", "discard"]))
            writes.append(f"{what} {offset} {length}")
        if writes:
            qemu_io(path, *writes)
        assert_clean(path)
        qemu_img("convert", "-f", "qed", "-O", "raw", path, flat)
        in_place(path, "-f", "qed", "-O", "raw")
        assert path.read_bytes() == flat.read_bytes()
