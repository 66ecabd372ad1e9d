"""What the kernel has cached of a raw file is shown only as long as no file of the image's chain has changed."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.mounts.mounts import mounted, status, until_closed, wait_until
from tests.helpers.qemu.cli import qemu_img, qemu_io

MIB = 1 << 20


def make_chain(source: Path) -> tuple[Path, Path]:
    """A raw base, and the image on top, with another one between them."""
    base, middle, top = source / "base", source / "middle.qed", source / "top.qed"
    base.write_bytes(b"\1" * MIB)
    qemu_img("create", "-q", "-f", "qed", "-b", "base", "-F", "raw", middle)
    qemu_img("create", "-q", "-f", "qed", "-b", "middle.qed", "-F", "qed", top)
    return base, top


def rewrite(path: Path, find: bytes, put: bytes) -> None:
    """Other bytes in the same file, of the same size and with the same time of change: `rsync --inplace -t`."""
    times = path.stat()
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(content.replace(find, put))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def rewrite_base(base: Path, top: Path) -> None:
    rewrite(base, b"\1", b"\2")


def replace_base(base: Path, top: Path) -> None:
    times = base.stat()
    new = base.with_suffix(".new")
    new.write_bytes(b"\2" * MIB)
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.rename(base)


def write_middle(base: Path, top: Path) -> None:
    qemu_io(top.with_name("middle.qed"), "write -P 2 0 1M")


Change = Callable[[Path, Path], None]

CHANGES: list[Change] = [rewrite_base, replace_base, write_middle]


@pytest.mark.parametrize("words", [[], ["--ro"]], ids=["writable", "read-only"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_has_changed_is_seen(source: Path, point: Path, words: list[str], change: Change) -> None:
    base, top = make_chain(source)
    raw = point / "top.raw"
    with mounted(*words, source, point):
        for _ in range(2):  # the second time from the cache
            assert raw.read_bytes() == b"\1" * MIB
            until_closed(point)
        change(base, top)
        assert raw.read_bytes() == b"\2" * MIB
        until_closed(point)
        assert raw.read_bytes() == b"\2" * MIB


@pytest.mark.parametrize("change", CHANGES)
def test_no_stale_byte_gets_into_the_overlay(source: Path, point: Path, change: Change) -> None:
    base, top = make_chain(source)
    raw = point / "top.raw"
    with mounted(source, point):
        assert raw.read_bytes() == b"\1" * MIB
        until_closed(point)
        change(base, top)
        with raw.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"\7", 5000)
            os.fsync(file.fileno())
    qemu_io(top, "read -P 2 0 5000", "read -P 7 5000 1", f"read -P 2 5001 {MIB - 5001}")


def test_an_image_that_was_rewritten_in_place_is_seen(source: Path, point: Path) -> None:
    """Although its inode, its size and its time of change are what they were."""
    image, raw = source / "a.qed", point / "a.raw"
    qemu_img("create", "-q", "-f", "qed", image, "1M")
    qemu_io(image, "write -P 0x51 0 64k")
    with mounted(source, point):
        assert raw.read_bytes()[:65536] == b"\x51" * 65536
        until_closed(point)
        rewrite(image, b"\x51" * 65536, b"\x52" * 65536)
        assert raw.read_bytes()[:65536] == b"\x52" * 65536
        until_closed(point)
        # another size of the disk in the same bytes of file
        rewrite(image, MIB.to_bytes(8, "little"), (MIB // 2).to_bytes(8, "little"))
        wait_until(lambda: raw.stat().st_size == MIB // 2)
        assert raw.read_bytes()[:65536] == b"\x52" * 65536


def test_a_base_that_changes_while_the_overlay_is_open(source: Path, point: Path) -> None:
    """Nobody locks it: what was cached before is dropped by the next open."""
    base, top = make_chain(source)
    raw = point / "top.raw"
    with mounted(source, point), raw.open("rb") as reader:
        assert reader.read(4096) == b"\1" * 4096
        rewrite_base(base, top)
        assert raw.read_bytes() == b"\2" * MIB


def test_an_image_that_is_rewritten_while_it_is_open(source: Path, point: Path) -> None:
    """Who opens it while others use it gets the old tables, as they have. What he read is dropped for those who come
    later."""
    image, raw = source / "a.qed", point / "a.raw"
    qemu_img("create", "-q", "-f", "qed", image, "1M")
    qemu_io(image, "write -P 1 0 64k", "write -P 2 64k 64k")
    entries = [run["offset"].to_bytes(8, "little") for run in json.loads(qemu_img("map", "--output=json", image))[:2]]
    with mounted(source, point):
        with raw.open("rb") as reader:
            assert reader.read(131072) == b"\1" * 65536 + b"\2" * 65536
            rewrite(image, b"".join(entries), b"".join(reversed(entries)))
            time.sleep(0.1)  # whatever a change leaves to be seen is to be seen
            raw.read_bytes()
        until_closed(point)
        time.sleep(1.2)  # pages are kept again
        assert raw.read_bytes()[:131072] == b"\2" * 65536 + b"\1" * 65536


def test_pages_are_kept_otherwise(source: Path, point: Path) -> None:
    """Our own writes, syncs, punches and times, and a new name or mode, are no reason to drop them."""
    _base, top = make_chain(source)
    raw = point / "top.raw"

    def reads() -> int:
        count = status(point)["requests"]["read"]
        assert isinstance(count, int)
        return count

    with mounted(source, point):
        with raw.open("r+b", buffering=0) as file:
            file.write(b"\3" * 65536)
            os.fsync(file.fileno())
        raw.read_bytes()
        until_closed(point)
        raw.read_bytes()  # the base had been new
        before = reads()
        for _ in range(3):
            until_closed(point)
            assert raw.read_bytes() == b"\3" * 65536 + b"\1" * (MIB - 65536)
            with raw.open("r+b", buffering=0) as file:
                file.write(b"\3" * 65536)
            os.utime(raw, ns=(10**18, 10**18))
            subprocess.run(["fallocate", "--punch-hole", "-o", "0", "-l", "65536", str(raw)], check=False)
            with raw.open("r+b", buffering=0) as file:
                file.write(b"\3" * 65536)
        assert reads() <= before + 3, (before, reads())  # all of it would be 8 each time
        number = raw.stat().st_ino
        until_closed(point)
        top.chmod(0o640)
        os.link(top, source / "other.img")
        wait_until(lambda: raw.stat().st_mode & 0o777 == 0o640)
        assert raw.stat().st_ino == number


@pytest.mark.parametrize("over_file", [True, False], ids=["file", "directory"])
def test_the_pages_of_the_first_reader_are_there_for_the_next_one(source: Path, point: Path, over_file: bool) -> None:
    """At once: nothing had been cached before it that could be wrong."""
    _base, top = make_chain(source)
    time.sleep(0.1)  # whatever a change leaves to be seen is to be seen
    raw = point / "top.raw"
    if over_file:
        raw = source / "raw"
        raw.touch()
    with mounted(top if over_file else source, raw if over_file else point):
        assert raw.read_bytes() == b"\1" * MIB
        reads = requests(raw if over_file else point)
        assert raw.read_bytes() == b"\1" * MIB
        assert requests(raw if over_file else point) == reads


def requests(point: Path) -> int:
    number: int = status(point)["requests"]["read"]
    return number
