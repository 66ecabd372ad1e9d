"""A guest's view of a raw file: loop devices, file systems, trees of files with checksums."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.qemu.cli import qedfuse

MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


def run(*command: str | Path, timeout: float = 120) -> str:
    """Run a command; its standard output. Fails the test with what the command said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}: exit {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


def qemu_check(image: Path) -> dict[str, int]:
    """`qemu-img check`'s report. Fails the test if it could not check everything."""
    command = ["qemu-img", "check", "-f", "qed", "--output=json", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode not in (0, 2, 3):
        pytest.fail(f"{image}: qemu-img check: exit {done.returncode}: {done.stderr or done.stdout}")
    report: dict[str, int] = json.loads(done.stdout)
    assert report["check-errors"] == 0, report
    return report


def assert_clean(image: Path, *, leaks: bool = False) -> None:
    """Closed in good order: nothing wrong for us nor for QEMU, no leaks unless they are allowed, no check due.

    QEMU counts one in every cluster_size - 1 clusters as leaked that is not, since it divides by that where it means
    cluster_size.
    """
    done = qedfuse("check", "--output=json", image)
    assert done.code in ((0, 3) if leaks else (0,)), done
    ours = json.loads(done.out)
    theirs = qemu_check(image)
    info = json.loads(run("qemu-img", "info", "--output=json", image))
    passed_over = image.stat().st_size // info["cluster-size"] // (info["cluster-size"] - 1)
    assert theirs.get("corruptions", 0) == 0, theirs
    assert theirs.get("leaks", 0) == ours["leaks"] + passed_over, (theirs, ours)
    assert not info["dirty-flag"], info


def need_guest(*programs: str) -> None:
    """Skip, with the reason, where a guest's file system cannot be mounted."""
    if os.geteuid() != 0:
        pytest.skip("needs root to set up loop devices")
    if not Path("/dev/loop-control").exists():
        pytest.skip("no loop devices here")
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")


def need_filesystem(name: str) -> None:
    """Skip where the kernel does not know a file system."""
    if modprobe := shutil.which("modprobe"):
        subprocess.run([modprobe, "-q", name], check=False, capture_output=True)
    known = Path("/proc/filesystems").read_text().split()
    if name not in known:
        pytest.skip(f"this kernel has no {name}")


@contextmanager
def loop_device(path: Path, *options: str) -> Iterator[Path]:
    """A loop device on a file, with its partitions as DEVICEp1 and so on if there are any."""
    device = Path(run("losetup", "--find", "--show", "--partscan", *options, path).strip())
    try:
        # partx reads the table itself, where the kernel knows none; it fails if there is none.
        subprocess.run(["partx", "--update", str(device)], check=False, capture_output=True, timeout=60)
        yield device
    finally:
        detach(device)


def detach(device: Path) -> None:
    """Detach and wait until it is done: the kernel defers it while somebody (udev, blkid) has the device open."""
    subprocess.run(["losetup", "--detach", str(device)], check=False, capture_output=True)
    backing = Path("/sys/block", device.name, "loop/backing_file")
    deadline = time.monotonic() + 20
    while backing.exists():
        if time.monotonic() > deadline:
            pytest.fail(f"{device} stays attached")
        time.sleep(0.02)


@contextmanager
def filesystem(device: Path, mountpoint: Path, *options: str) -> Iterator[Path]:
    """A file system, mounted for a block."""
    mountpoint.mkdir(exist_ok=True)
    run("mount", *options, device, mountpoint)
    try:
        yield mountpoint
    finally:
        done = subprocess.run(["umount", str(mountpoint)], capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            subprocess.run(["umount", "-l", str(mountpoint)], check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def make_tree(root: Path, seed: int, files: int = 120) -> None:
    """A reproducible tree: small and large files, sparse ones, links, deep directories, odd names."""
    rnd = random.Random(seed)
    for number in range(files):
        directory = root / f"d{number % 7}" / f"e{number % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"file {number} ä"
        size = rnd.choice([0, 1, 511, 4096, 70_000, 300_001])
        path.write_bytes(rnd.randbytes(size))
        if number % 10 == 0:
            with path.open("r+b") as file:
                file.seek(1 << 20)
                file.write(rnd.randbytes(100))
        if number % 13 == 0:
            (directory / f"link{number}").symlink_to(path.name)


def checksums(root: Path) -> dict[str, str]:
    """Relative path -> checksum of the content, or target of the link."""
    result = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            result[name] = f"-> {path.readlink()}"
        elif path.is_file():
            result[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return result
