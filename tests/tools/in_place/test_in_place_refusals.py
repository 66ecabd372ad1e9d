"""What is not converted in place: one line says why, and that the file is unchanged, and it is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qedfuse.chain.unfinished import SUFFIX
from qedfuse.cli.main import main
from qedfuse.qed.header import FEATURE_NEED_CHECK
from qedfuse.tools.in_place import coming_home
from tests.helpers.images.check_images import Builder
from tests.helpers.images.devices import device_with
from tests.helpers.mounts.guests import loop_device, need_guest
from tests.helpers.qemu.cli import new_image, new_overlay, one_line, qedfuse_inside, qemu_has_open, qemu_img, qemu_io

TO_QED, TO_RAW = ("-O", "qed"), ("-O", "raw")


def refused(path: Path, words: tuple[object, ...], *parts: str) -> None:
    """The command must fail with one line that has all the parts, and leave everything as it was."""
    before = path.read_bytes(), path.stat(), os.listdir(path.parent)
    one_line(qedfuse_inside("convert", "--in-place", *map(str, words), path), 1, *parts, f"; {path} is unchanged\n")
    after = path.read_bytes(), path.stat(), os.listdir(path.parent)
    assert after[0] == before[0] and after[1].st_mtime_ns == before[1].st_mtime_ns and after[2] == before[2]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"disk" * 50_048)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return new_image(tmp_path / "disk.qed", fill=7)


def test_sizes_that_are_none(disk: Path) -> None:
    for size, reason in ((0, "is empty"), (100, "truncate -s %512"), (5121, "truncate -s %512")):
        os.truncate(disk, size)
        refused(disk, TO_QED, reason)
    subprocess.run(["truncate", "-s", "%512", disk], check=True)
    assert main(["convert", "--in-place", *TO_QED, str(disk)]) == 0


def test_formats(disk: Path, image: Path, tmp_path: Path) -> None:
    refused(disk, TO_RAW, "is a raw disk already")
    refused(disk, (), "is a raw disk already")
    refused(disk, ("-f", "qed", *TO_RAW), "not a qed image")
    refused(image, TO_QED, "is a qed image already")
    vmdk = tmp_path / "disk.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", vmdk, "1M")
    refused(vmdk, TO_QED, "vmdk")
    qcow2 = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", qcow2, "1M")
    refused(qcow2, TO_RAW, "cannot become raw in place from qcow2", "qedfuse convert -f qcow2 -O raw")


def test_geometry_that_cannot_map_it(disk: Path) -> None:
    os.truncate(disk, 5 << 30)
    size = disk.stat().st_size
    done = qedfuse_inside("convert", "--in-place", *TO_QED, "-o", "cluster_size=4k,table_size=1", disk)
    one_line(done, 1, "cluster_size=65536,table_size=4 can", "is unchanged")
    assert disk.stat().st_size == size


def test_in_use(disk: Path, image: Path) -> None:
    with qemu_has_open(image):
        refused(image, TO_RAW, "is in use by another process")
    with disk.open("rb"):
        refused(disk, TO_QED, "is open in another process")
    assert main(["convert", "--in-place", *TO_QED, str(disk)]) == 0


def test_attached_to_a_loop_device(disk: Path) -> None:
    need_guest("losetup")
    with loop_device(disk) as loop:
        refused(disk, TO_QED, f"is open as the loop device {loop}")


def test_a_block_device(image: Path) -> None:
    with device_with(image, 4 << 20) as device:
        before = device.read_bytes()
        one_line(qedfuse_inside("convert", "--in-place", *TO_RAW, device), 1, "block device", f"{device} is unchanged")
        assert device.read_bytes() == before


def test_other_names(disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.hardlink_to(disk)
    content = disk.read_bytes()
    refused(disk, TO_QED, "hard links", "--force")
    assert main(["convert", "--in-place", "--force", *TO_QED, str(disk)]) == 0
    assert other.read_bytes() == disk.read_bytes() != content


def test_a_symbolic_link(disk: Path, tmp_path: Path) -> None:
    """What it leads to is converted, and the journal lies there."""
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link"
    link.symlink_to(disk)
    content = disk.read_bytes()
    assert main(["convert", "--in-place", *TO_QED, str(link)]) == 0
    assert link.is_symlink() and disk.read_bytes()[:4] == b"QED\0"
    assert main(["convert", "--in-place", str(link)]) == 0
    assert disk.read_bytes() == content
    (tmp_path / f"disk.raw{SUFFIX}").write_bytes(b"{}")
    one_line(qedfuse_inside("convert", "--in-place", *TO_QED, link), 1, f"disk.raw{SUFFIX}", f"{link} is unchanged")


def test_what_is_no_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, tmp_path / "none", Path("/dev/null")):
        one_line(qedfuse_inside("convert", "--in-place", *TO_QED, path), 1, str(path), "is unchanged")


def test_a_file_that_cannot_be_written(disk: Path) -> None:
    if subprocess.run(["chattr", "+i", disk], check=False, capture_output=True).returncode:
        pytest.skip("no file can be made immutable here")
    try:
        refused(disk, TO_QED, "operation not permitted")
    finally:
        subprocess.run(["chattr", "-i", disk], check=True)


def test_no_place_for_the_journal(tmp_path: Path) -> None:
    disk = tmp_path / ("d" * 250)
    disk.write_bytes(bytes(4096))
    refused(disk, TO_QED, "file name too long")


# -- images that stay images -------------------------------------------------------------------------------------------


def test_a_backing_file(tmp_path: Path) -> None:
    refused(new_overlay(tmp_path / "over.qed", "base"), TO_RAW, "has a backing file", "qedfuse convert -O raw")


def test_not_closed_cleanly(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(16)
        file.write(bytes([FEATURE_NEED_CHECK]))
    refused(image, TO_RAW, "was not closed cleanly", "qedfuse check -r all")


def test_a_long_header(tmp_path: Path) -> None:
    builder = Builder(header_size=3)
    builder.data(builder.table(0), 1)
    refused(builder.save(tmp_path / "disk.qed"), TO_RAW, "a header of 3 clusters", "qedfuse convert -O raw")


def test_no_disk_in_it(tmp_path: Path) -> None:
    refused(new_image(tmp_path / "disk.qed", "0"), TO_RAW, "0 bytes")


def test_corrupt_tables(tmp_path: Path) -> None:
    """Twice referred to, outside the file, tables that overlap: also where nothing would have to move."""
    for number, damage in enumerate(["twice", "outside", "beyond", "overlap", "first"]):
        builder = Builder()
        tables = [builder.table(0), builder.table(1)]
        [cluster] = builder.data(tables[0], 7)
        assert cluster == 7 * 4096
        if damage == "twice":
            builder.set_l2(tables[0], 5, cluster)
        elif damage == "outside":
            builder.set_l2(tables[0], 100, 100 * 4096)
        elif damage == "beyond":
            builder.set_l1(2, 1 << 40)
        elif damage == "overlap":
            builder.set_l1(1, tables[0] + 4096)
        else:
            builder.set_l2(tables[0], 0, tables[1])
        refused(builder.save(tmp_path / f"{number}.qed"), TO_RAW, "corrupt" if damage != "beyond" else "", "check")


def test_too_much_to_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    image = new_image(tmp_path / "disk.qed", "8M")
    for start in range(7, -1, -1):
        qemu_io(image, f"write -P 3 {start}M 512k")
    before = image.read_bytes()
    monkeypatch.setattr(coming_home, "MIN_LIMIT", 1 << 20)
    assert main(["convert", "--in-place", str(image)]) == 1
    told = capfd.readouterr().err
    assert (
        "lie elsewhere than in a raw disk" in told and f"`qedfuse convert {image} TARGET`; {image} is unchanged" in told
    )
    assert image.read_bytes() == before


# -- wrong usage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--in-place", "disk", "target"], "excludes TARGET"),
        (["--in-place", "-B", "base", "-O", "qed", "disk"], "excludes -B"),
        (["--in-place", "-n", "disk"], "excludes -n"),
        (["--in-place", "-U", "disk"], "excludes -U"),
        (["--in-place", "-S", "4k", "disk"], "excludes -S"),
        (["--in-place", "--no-backing", "disk"], "excludes --no-backing"),
        (["--in-place", "-O", "qed", "-o", "cluster_size=3k", "disk"], "power of two"),
        (["--in-place", "-O", "qed", "-o", "backing_file=x", "disk"], "unknown option"),
        (["--in-place", "-o", "cluster_size=4k", "disk"], "unknown option"),
        (["--undo", "disk", "target"], "--undo is for --in-place"),
        (["--force", "disk", "target"], "--force is for --in-place"),
        (["disk"], "missing argument 'TARGET'"),
        (["--in-place"], "missing argument 'SOURCE'"),
    ],
)
def test_wrong_usage(tmp_path: Path, words: list[str], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").write_bytes(bytes(4096))
    one_line(qedfuse_inside("convert", *words), 2, part)
    assert os.listdir(tmp_path) == ["disk"] and (tmp_path / "disk").read_bytes() == bytes(4096)


def test_nothing_to_undo(disk: Path) -> None:
    refused(disk, ("--undo",), "no conversion in place is under way")
    refused(disk, ("--undo", *TO_QED), "no conversion in place is under way")
