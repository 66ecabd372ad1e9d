"""A QED image on a block device, such as a logical volume: everything that only reads."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_image
from qedfuse.host.file_storage import FileStorage
from tests.helpers.images.devices import device_with, qemu_is_refused
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.mounts import mounted
from tests.helpers.qemu.cli import one_line, qedfuse, qemu_has_open, qemu_img, qemu_io

pytestmark = pytest.mark.guest

CLUSTER = 4096
SIZE = 1 << 20
#: Device sizes by name: of an image of 23 clusters.
SIZES = {"full": 23 * CLUSTER, "odd": 40 * CLUSTER + 512, "larger": 4 << 20}


def make_image(path: Path, *options: str) -> Path:
    qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=4096,table_size=2", *options, path, str(SIZE))
    qemu_io(path, "write -P 7 0 64k", "write -P 8 128k 8k")
    return path


def reading(path: Path) -> list[object]:
    """What the commands that read say of an image, without its name."""
    map_json = json.loads(qedfuse("map", "--output=json", path).out)
    for entry in map_json:
        entry.pop("filename", None)
    check = qedfuse("check", "--output=json", path)
    report = json.loads(check.out)
    del report["filename"]
    human = qedfuse("map", path).out.replace(str(path), "NAME")
    info = json.loads(qedfuse("info", "--output=json", path).out)
    return [map_json, human, check.code, report, info["format"], info["virtual-size"], info["format-specific"]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("read_only", [False, True])
def test_what_reads(tmp_path: Path, size: str, read_only: bool) -> None:
    image = make_image(tmp_path / "a.qed")
    assert image.stat().st_size == SIZES["full"]
    with device_with(image, SIZES[size], read_only=read_only) as device:
        assert reading(device) == reading(image)
        assert qedfuse("info", "--untrusted", device).code == 0
        (chain,) = json.loads(qedfuse("info", "--backing-chain", "--output=json", device).out)
        theirs = json.loads(qemu_img("info", "--output=json", device))
        assert (chain["virtual-size"], chain["actual-size"]) == (theirs["virtual-size"], theirs["actual-size"])
        file = chain["children"][0]["info"]
        assert (file["format"], file["virtual-size"]) == ("host_device", SIZES[size])
        for format in ("raw", "qed"):
            assert qedfuse("convert", "-O", format, device, tmp_path / f"out.{format}").code == 0
            qemu_img("compare", "-F", format, "-f", "qed", image, tmp_path / f"out.{format}")


@pytest.mark.parametrize("size", SIZES)
def test_a_mount_that_reads(tmp_path: Path, size: str) -> None:
    image, raw, flat = make_image(tmp_path / "a.qed"), tmp_path / "raw", tmp_path / "flat"
    raw.touch()
    qemu_img("convert", "-f", "qed", "-O", "raw", image, flat)
    with device_with(image, SIZES[size], read_only=True) as device:
        before = device.read_bytes()
        with mounted("--ro", device, raw):
            assert raw.read_bytes() == flat.read_bytes()
            assert raw.stat().st_blocks > 0
        assert device.read_bytes() == before


def test_as_a_base(tmp_path: Path) -> None:
    """As the backing file of another image, and over one."""
    image, top = make_image(tmp_path / "a.qed"), tmp_path / "top.qed"
    with device_with(image, SIZES["larger"]) as device:
        qemu_img("create", "-q", "-f", "qed", "-b", device, "-F", "qed", top)
        qemu_io(top, "write -P 9 4k 100k")
        assert qedfuse("convert", top, tmp_path / "ours").code == 0
        qemu_img("compare", "-f", "qed", top, tmp_path / "ours")
        one_line(qedfuse("map", "--backing-root", tmp_path, top), 1, "lies outside")
    over = make_image(tmp_path / "over.qed", "-b", str(image), "-F", "qed")
    with device_with(over, SIZES["larger"]) as device:
        assert qedfuse("convert", device, tmp_path / "ours").code == 0
        qemu_img("compare", "-f", "qed", over, tmp_path / "ours")


def test_a_loop_of_nodes(tmp_path: Path) -> None:
    """Two nodes of one device are one file: an image that is its own base is found out."""
    image = tmp_path / "a.qed"
    with device_with(make_image(image), SIZES["larger"]) as device:
        node = tmp_path / "node"
        number = device.stat().st_rdev
        os.mknod(node, 0o600 | 0o060000, number)
        qemu_img("create", "-q", "-u", "-f", "qed", "-b", node, "-F", "qed", image, "1M")
        subprocess.run(["dd", f"if={image}", f"of={device}", "conv=notrunc,fsync", "status=none"], check=True)
        one_line(qedfuse("map", device), 1, "loop")


def test_too_small_for_its_table(tmp_path: Path) -> None:
    image = make_image(tmp_path / "a.qed")
    os.truncate(image, 2 * CLUSTER)
    with device_with(image, 2 * CLUSTER) as device:
        one_line(qedfuse("info", device), 1, str(device), "cut off")
        one_line(qedfuse("mount", "--ro", device, tmp_path), 1, str(device), "cut off")


def test_no_image_can_be_made_there(tmp_path: Path) -> None:
    """QEMU says so, too. Nothing is written."""
    image = make_image(tmp_path / "a.qed")
    with device_with(image, SIZES["larger"]) as device:
        before = device.read_bytes()
        one_line(qedfuse("create", device, "1M"), 1, str(device), "block device")
        one_line(qedfuse("convert", "-O", "qed", image, device), 1, str(device), "regular file")
        assert device.read_bytes() == before


def test_a_directory_shows_files_only(tmp_path: Path) -> None:
    """No link in a source directory makes the daemon open a device."""
    source, point = tmp_path / "source", tmp_path / "point"
    source.mkdir()
    point.mkdir()
    with device_with(make_image(tmp_path / "a.qed"), SIZES["larger"]) as device:
        (source / "link.qed").symlink_to(device)
        with mounted("--ro", source, point):
            assert os.listdir(point) == []


def test_device_storage(tmp_path: Path) -> None:
    """The size is the device's, all of it is data, and a closed device stays closed."""

    async def main(device: Path) -> None:
        storage = FileStorage.open(device, writable=False)
        try:
            size = SIZES["odd"]
            assert storage.fixed and storage.size() == size
            assert storage.next_data(5) == 5 and storage.next_hole(5) == size
            assert storage.next_data(size) is None
            with raises_errno(errno.ENXIO):
                storage.next_hole(size)
            buffer = bytearray(1024)
            await storage.read_into(size - 1024, memoryview(buffer))
            with raises_errno(errno.EIO):
                await storage.read_into(size - 512, memoryview(buffer))
        finally:
            await storage.close()

    with device_with(make_image(tmp_path / "a.qed"), SIZES["odd"]) as device:
        trio.run(main, device)


def test_locks_of_a_reader(tmp_path: Path) -> None:
    """QEMU's locks are taken on the device's node, and honoured."""

    async def main(device: Path) -> None:
        async with open_image(device, read_only=True) as image:
            assert await image.read(0, 512) == b"\7" * 512
            assert await trio.to_thread.run_sync(qemu_is_refused, device)

    with device_with(make_image(tmp_path / "a.qed"), SIZES["larger"]) as device:
        trio.run(main, device)
        assert not qemu_is_refused(device)
        with qemu_has_open(device):
            one_line(qedfuse("map", device), 1, str(device), "in use by another process", "qemu-io")
            assert qedfuse("map", "-U", device).code == 0
