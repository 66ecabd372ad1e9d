"""A real mount and a guest in another process, with strace looking at both: all that they do to their files.

strace is attached once the image is mounted: fusermount3 is set-user-ID and would not work under it, and nothing is
written while the image is opened (it is compared).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from qedfuse.daemon.control import Client
from qedfuse.qed.header import HEADER_BYTES, Header
from tests.helpers.doubles.crash import SEED
from tests.helpers.doubles.ram import RamFile
from tests.helpers.images.devices import device_with
from tests.helpers.images.images import TINY, Chain, new_chain
from tests.helpers.judges.history import SECTOR
from tests.helpers.judges.strace_log import OPTIONS, Event, read_log
from tests.helpers.judges.survival import raw_below
from tests.helpers.mounts.modes import PYTHON, Mode
from tests.helpers.mounts.mounted_guest import CLUSTER, SIZE, SIZES
from tests.helpers.mounts.mounts import mount_at, mounted, need_fuse
from tests.helpers.qemu.cli import ROOT, TIMEOUT, environment

#: The sizes of backing files: some of the guest's sectors lie behind the end.
BELOW = {"alone": 0, "over raw": 30 * CLUSTER + SECTOR}
#: With the writeback cache, for requests that overlap: past it, without the fast path, the kernel writes one at a time.
CACHED = {"threads", "asynchronous"}


@dataclass
class Traced:
    """What happened to the image and to the raw file, from the mount's beginning to its end."""

    chain: Chain  # before
    flat: bytes  # what it read as
    image: str
    raw: str
    journal: str  # see mounted_guest.py
    events: list[Event]
    after: bytes  # the image file
    native: int  # writes that the fast path answered


def trace(
    directory: Path, scenario: str, mode: Mode, *options: str, below: int = 0, seed: int = 1, device: int = 0
) -> Traced:
    """Mount a fresh image (over a raw file of `below` bytes) in `directory`, run the guest's scenario, unmount.

    `device`: the image lies on a block device of so many bytes.
    """
    need_fuse()
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    directory = directory.resolve()  # as strace shows it
    size = SIZES.get(scenario, SIZE)
    lower, flat = raw_below(below) if below else ([], b"")
    chain = trio.run(new_chain, size, TINY, lower)
    image = chain.dump(directory)
    raw = directory / "disk.raw"
    raw.touch()
    journal = directory / "journal"
    journal.touch()
    log = directory / "strace.log"
    with ExitStack() as stack:
        if device:
            if lower:
                _name_backing_file(image, directory / "below0")
            image = stack.enter_context(device_with(image, device))
            chain = Chain(RamFile(size=device, fixed=True), lower)
            chain.file.write(0, image.read_bytes())
        guest = stack.enter_context(_guest(scenario, str(raw), str(journal), "0" if mode == PYTHON else "1", str(seed)))
        with mounted(image, raw, *mode, *options, foreground=True) as mount:
            assert image.read_bytes() == chain.file.read(0, chain.file.size), "it was written when nobody looked"
            strace = stack.enter_context(_strace(log, [image, raw, journal], [mount.pid(), guest.pid]))
            guest.communicate(b"go\n", TIMEOUT)
            assert guest.returncode == 0, f"the guest ends with {guest.returncode}"
            native = _native_writes(raw)
            # Quicker than `qedfuse umount`; the daemon closes the image all the same.
            subprocess.run(["fusermount3", "-u", str(raw)], check=True, timeout=TIMEOUT)
        assert strace.wait(TIMEOUT) == 0
        after = image.read_bytes()
    return Traced(
        chain=chain,
        flat=flat[:size].ljust(size, b"\0"),
        image=str(image),
        raw=str(raw),
        journal=str(journal),
        events=read_log(log),
        after=after,
        native=native,
    )


def traced(
    directory: Path, scenario: str, mode: Mode, backing: str, seed: int = SEED, *, cached: bool | None = None
) -> Traced:
    """The same, over one of the backing files of `BELOW`, with the mount options that the scenario wants, or with a
    page cache or without it."""
    if cached is None:
        cached = scenario in CACHED or (scenario == "walk" and seed % 2 == 0)
    options = () if cached else ("-o", "direct_io")
    return trace(directory, scenario, mode, *options, below=BELOW[backing], seed=seed)


def _name_backing_file(image: Path, path: Path) -> None:
    """By its absolute path: the image is going to lie elsewhere."""
    name = os.fsencode(path)
    with image.open("r+b") as file:
        header = Header.decode(file.read(HEADER_BYTES), str(image))
        file.seek(0)
        file.write(replace(header, backing_filename_size=len(name)).encode())
        file.seek(header.backing_filename_offset)
        file.write(name)


def _native_writes(raw: Path) -> int:
    """By `qedfuse status`."""
    found = mount_at(raw)
    assert found is not None
    with Client(found) as client:
        return int(client.ask("status")["fastpath-counters"].get("writes", 0))


@contextmanager
def _guest(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.helpers.mounts.mounted_guest", *words]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def _strace(log: Path, files: list[Path], pids: list[int]) -> Iterator[subprocess.Popen[bytes]]:
    """Attached to the processes until they end, or until the block does."""
    command = ["strace", *OPTIONS, "-o", str(log)]
    for file in files:
        command += ["-P", str(file)]
    for pid in pids:
        command += ["-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + TIMEOUT
            while not all(_is_traced(pid) for pid in pids):
                if process.poll() is not None:
                    pytest.skip("strace may not attach here")
                assert time.monotonic() < deadline, "strace does not attach"
                time.sleep(0.005)
            yield process
        finally:
            process.terminate()  # nothing if it has ended; otherwise it lets them go


def _is_traced(pid: int) -> bool:
    """Whether each thread has its tracer."""
    return all("TracerPid:\t0\n" not in file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/status"))
