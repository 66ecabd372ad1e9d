"""A guest's file system in a qcow2 image that becomes a QED image where it is. Its own checker is one judge, and the
checksums of its files are the other.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.images.qcow2_in_place import expect_conversion
from tests.helpers.mounts.guests import checksums, make_tree, run
from tests.helpers.qemu.cli import qedfuse, qemu_img


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A disk with a tree of files in an ext4, whose metadata has checksums, and the files' checksums."""
    directory = tmp_path_factory.mktemp("guest")
    tree = directory / "tree"
    tree.mkdir()
    make_tree(tree, seed=1, files=60)
    raw = directory / "disk.raw"
    run("mkfs.ext4", "-q", "-O", "metadata_csum", "-d", tree, raw, "40M")
    return raw, checksums(tree)


@pytest.mark.parametrize("how", ["plain", "compressed", "overlay"])
def test_ext4(tmp_path: Path, disk: tuple[Path, dict[str, str]], how: str) -> None:
    raw, before = disk
    image = tmp_path / "a.qcow2"
    base = tmp_path / "base.raw"
    base.write_bytes(raw.read_bytes()[: 10 << 20].ljust(40 << 20, b"\0"))
    options: dict[str, list[object]] = {
        "plain": ["-o", "cluster_size=4k"],
        "compressed": ["-c"],
        "overlay": ["-B", base, "-F", "raw"],
    }
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options[how], raw, image)
    old = expect_conversion(image)
    flat, found = tmp_path / "flat", tmp_path / "found"
    done = qedfuse("convert", "-f", "qed", "-O", "raw", image, flat)
    assert done == (0, "", "")
    run("e2fsck", "-f", "-n", flat)
    found.mkdir()
    run("debugfs", "-R", f"rdump / {found}", flat)
    (found / "lost+found").rmdir()
    assert checksums(found) == before
    old.unlink()
