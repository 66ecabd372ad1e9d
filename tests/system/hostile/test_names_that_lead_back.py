"""Names that lead into qedfuse mounts: in images, and in source directories. They used to hang for good.

All is mounted for real. Whoever hangs is let go in the end by aborting the mounts' connections.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.mounts import Mounted, aborted, mounted
from tests.helpers.mounts.outsiders import SOON, finish, first_byte, run
from tests.helpers.qemu.cli import new_image, new_overlay, one_line, qedfuse


def directory(path: Path) -> Path:
    path.mkdir()
    return path


@contextmanager
def mounted_and_aborted(*words: str | Path) -> Iterator[Mounted]:
    """A mount that ends even if it hangs."""
    with ExitStack() as stack:
        mount = stack.enter_context(mounted(*words))
        stack.enter_context(aborted(mount.point))
        yield mount


#: Opens each file in a thread of its own, all at the same time, and prints the errnos.
OPEN_AT_ONCE = """
import os, sys, threading
barrier = threading.Barrier(len(sys.argv) - 1)
def read(path):
    barrier.wait()
    try:
        open(path, "rb")
    except OSError as error:
        os.write(1, b"%d\\n" % error.errno)
for path in sys.argv[1:]:
    threading.Thread(target=read, args=(path,)).start()
"""

BROKEN = (1, b"", os.strerror(errno.EIO))


@pytest.mark.parametrize("confined", [False, True])
def test_sixty_images_that_look_into_their_own_mount(tmp_path: Path, confined: bool) -> None:
    source, point = directory(tmp_path / "images"), directory(tmp_path / "mnt")
    first = new_overlay(source / "0.qed", point / "none.raw")
    content, name = first.read_bytes(), os.fsencode(point / "none.raw")
    for number in range(1, 60):
        digits = f"{number:04}".encode()
        (source / f"{number}.qed").write_bytes(content.replace(name, name[: -len("none.raw")] + digits + b".raw"))
    new_image(source / "good.qed", fill=7)
    words = ("--backing-root", tmp_path) if confined else ()
    with mounted_and_aborted(*words, source, point) as mount:
        for _ in range(3):
            readers = run(sys.executable, "-c", OPEN_AT_ONCE, *(point / f"{number}.raw" for number in range(60)))
            assert readers.communicate(timeout=SOON)[0].split() == [str(errno.EIO).encode()] * 60
        assert first_byte(point / "good.raw") == b"\7"
        message = f"refers to backing file {point}/0001.raw, which lies in a qedfuse mount ({point})"
        assert f"{source}/1.qed: {message}" in mount.text()


def test_two_mounts_that_look_into_each_other(tmp_path: Path) -> None:
    a, b = directory(tmp_path / "A"), directory(tmp_path / "B")
    on_a, on_b = directory(tmp_path / "mA"), directory(tmp_path / "mB")
    new_overlay(a / "a.qed", on_b / "b.raw")
    new_overlay(b / "b.qed", on_a / "a.raw")
    new_image(a / "good.qed", fill=1)
    new_image(b / "good.qed", fill=2)
    with mounted_and_aborted(a, on_a) as first, mounted_and_aborted(b, on_b) as second:
        readers = [run("head", "-c", "1", path) for path in (on_a / "a.raw", on_b / "b.raw", on_a / "a.raw")]
        assert [finish(reader) for reader in readers] == [BROKEN] * 3
        assert (first_byte(on_a / "good.raw"), first_byte(on_b / "good.raw")) == (b"\1", b"\2")
        assert f"in a qedfuse mount ({on_b})" in first.text()
        assert f"in a qedfuse mount ({on_a})" in second.text()


def test_links_in_a_source_directory(tmp_path: Path) -> None:
    source, point = directory(tmp_path / "images"), directory(tmp_path / "mnt")
    new_image(source / "good.qed", fill=7)
    (tmp_path / "dl").symlink_to(point)
    (source / "dl").symlink_to(point)
    (source / "x.qed").symlink_to("dl/x.raw")
    (source / "y.qed").symlink_to("../dl/good.raw")
    (source / "direct.qed").symlink_to(point / "good.raw")
    (source / "dots.qed").symlink_to("./../mnt/../mnt/good.raw")
    (source / "twice.qed").symlink_to("direct.qed")
    (source / "endless.qed").symlink_to("endless.qed")
    (source / "fine.qed").symlink_to(source / "good.qed")
    with mounted_and_aborted(source, point):
        listing = run("ls", point)
        out, _ = listing.communicate(timeout=SOON)
        assert out.split() == [b"fine.raw", b"good.raw"]
        for name in ("x", "y", "direct", "dots", "twice", "endless"):
            assert finish(run("cat", point / f"{name}.raw")) == (1, b"", os.strerror(errno.ENOENT))
        assert first_byte(point / "fine.raw") == b"\7"


def test_a_mount_seen_elsewhere_is_the_same(tmp_path: Path) -> None:
    """Bound to another place, or reached by way of /proc."""
    source, point, bound = (directory(tmp_path / name) for name in ("images", "mnt", "bound"))
    new_image(source / "good.qed", fill=7)
    new_overlay(source / "bound.qed", bound / "good.raw")
    new_overlay(source / "proc.qed", f"/proc/self/root{point}/good.raw")
    new_overlay(source / "dots.qed", f"{point}/../mnt/good.raw")
    with mounted_and_aborted(source, point), aborted(bound):
        subprocess.run(["mount", "--bind", point, bound], check=True)
        for name in ("bound", "proc", "dots"):
            assert finish(run("head", "-c", "1", point / f"{name}.raw")) == BROKEN
        assert first_byte(point / "good.raw") == b"\7"


def test_a_file_mount_is_not_entered(tmp_path: Path) -> None:
    source, point = directory(tmp_path / "images"), directory(tmp_path / "mnt")
    image = new_image(tmp_path / "disk.qed", fill=7)
    new_overlay(source / "top.qed", tmp_path / "disk.raw")
    (source / "link.qed").symlink_to("../disk.raw")
    (source / "here.qed").touch()
    (tmp_path / "disk.raw").touch()
    with mounted_and_aborted(image, tmp_path / "disk.raw") as other, mounted_and_aborted(source, point) as mount:
        subprocess.run(["mount", "--bind", other.point, source / "here.qed"], check=True)
        with aborted(source / "here.qed"):
            listing = run("ls", point)
            assert listing.communicate(timeout=SOON)[0].split() == [b"top.raw"]
            assert finish(run("head", "-c", "1", point / "top.raw")) == BROKEN
            assert f"in a qedfuse mount ({other.point})" in mount.text()


def test_commands_without_a_mount_refuse_it_too(tmp_path: Path) -> None:
    point = directory(tmp_path / "mnt")
    top = new_overlay(tmp_path / "top.qed", "mnt/disk.raw")
    with mounted_and_aborted(new_image(tmp_path / "disk.qed", fill=7), point):
        one_line(qedfuse("map", top), 1, str(top), f"refers to backing file {point}/disk.raw", f"({point})")
        (tmp_path / "base.raw").write_bytes(b"\5" * (1 << 20))
        new_overlay(tmp_path / "over.qed", "base.raw")
        assert qedfuse("map", "../over.qed", cwd=point).code == 0  # seen from the mount, and no way through it


def test_a_source_directory_in_a_qedfuse_mount_is_refused(tmp_path: Path) -> None:
    source, point, other = (directory(tmp_path / name) for name in ("images", "mnt", "other"))
    new_image(source / "good.qed", fill=7)
    with mounted_and_aborted(source, point):
        one_line(qedfuse("mount", point, other), 2, str(point), "lies in a qedfuse mount")


def test_a_source_directory_that_is_mounted_over_later(tmp_path: Path) -> None:
    first, second = directory(tmp_path / "first"), directory(tmp_path / "second")
    on_first = directory(tmp_path / "mnt")
    new_image(first / "a.qed", fill=7)
    new_image(second / "b.qed", fill=7)
    with mounted_and_aborted(first, on_first) as mount, mounted_and_aborted(second, first):
        assert run("ls", on_first).communicate(timeout=SOON)[0] == b""
        assert f"{first}: lies in a qedfuse mount" in mount.text()
        with raises_errno(errno.ENOENT):
            os.stat(on_first / "a.raw")
