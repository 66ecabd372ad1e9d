"""Conversions in place at the host's limits: a full file system, the largest file, time and memory."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfuse.cli.main import main
from tests.helpers.images.conversions import usage
from tests.helpers.mounts.guests import filesystem, loop_device, need_filesystem, need_guest, run
from tests.helpers.qemu.cli import environment, one_line, qedfuse, qemu_img, qemu_io

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


@pytest.fixture(params=["ext4", "tmpfs"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    need_guest("mkfs.ext4")
    if request.param == "tmpfs":
        with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs", "-o", f"size={16 * MIB}") as point:
            yield point
        return
    disk = tmp_path / "host.raw"
    with disk.open("wb") as file:
        file.truncate(16 * MIB)
    run("mkfs.ext4", "-q", "-m", "0", disk)
    with loop_device(disk) as loop, filesystem(loop, tmp_path / "host") as point:
        yield point


def fill_up(host: Path, free: int) -> None:
    """Leave about so many bytes."""
    with (host / "ballast").open("wb", buffering=0) as file:
        room = os.statvfs(host).f_bavail * os.statvfs(host).f_bsize - free
        while room > 0:
            room -= file.write(bytes(min(room, 64 << 10)))
        os.fsync(file.fileno())


def test_no_space_for_the_tables(host: Path) -> None:
    disk = host / "disk"
    content = random.Random(1).randbytes(4 * MIB)
    disk.write_bytes(content)
    fill_up(host, 300 << 10)
    free = os.statvfs(host).f_bavail
    done = qedfuse("convert", "--in-place", "-O", "qed", disk)
    one_line(done, 1, "no space left on device", f"{disk} is unchanged")
    assert disk.read_bytes() == content
    assert sorted(name for name in os.listdir(host) if name != "lost+found") == ["ballast", "disk"]
    assert os.statvfs(host).f_bavail >= free - 4
    (host / "ballast").unlink()
    assert main(["convert", "--in-place", "-O", "qed", str(disk)]) == 0
    qemu_img("check", "-f", "qed", disk)


def test_no_space_for_what_must_move(host: Path) -> None:
    """An image that has grown: its clusters do not lie where a raw disk has them."""
    disk = host / "disk"
    with disk.open("wb") as file:
        file.truncate(2 * MIB)
    assert main(["convert", "--in-place", "-O", "qed", str(disk)]) == 0
    qemu_img("resize", "-q", "-f", "qed", disk, "9M")
    qemu_io(disk, "write -P 1 4M 4M")
    flat, before = host.parent / "flat", disk.read_bytes()
    qemu_img("convert", "-f", "qed", "-O", "raw", disk, flat)
    fill_up(host, MIB)
    done = qedfuse("convert", "--in-place", disk)
    one_line(done, 1, "no space left on device", f"{disk} is unchanged")
    assert disk.read_bytes() == before
    (host / "ballast").unlink()
    assert main(["convert", "--in-place", str(disk)]) == 0
    assert disk.read_bytes() == flat.read_bytes()


def test_a_limit_of_the_files_size(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"d" * MIB)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    one_line(qedfuse("convert", "--in-place", "-O", "qed", disk, preexec=limit), 1, "file too large", "is unchanged")
    assert disk.read_bytes() == b"d" * MIB


# -- large ones --------------------------------------------------------------------------------------------------------

#: Runs the command, and prints seconds and the most memory (MiB) that it had.
_MEASURED = """
import resource, sys, time
from qedfuse.cli.main import main
start = time.monotonic()
code = main(sys.argv[1:])
print(time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
sys.exit(code)
"""


def measured(*words: object) -> tuple[float, float]:
    command = [sys.executable, "-c", _MEASURED, *map(str, words)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=True)
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory


def scattered(path: Path, size: int, runs: int) -> dict[int, bytes]:
    """A disk of `size` bytes with so many runs of 4 KiB, and what some of them hold."""
    rnd = random.Random(2)
    known = {}
    with path.open("wb") as file:
        try:
            file.truncate(size)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            pytest.skip("no file can be so large here")
        for number in range(runs):
            offset = rnd.randrange(size // 4096) * 4096
            content = rnd.randbytes(16) * 256
            file.seek(offset)
            file.write(content)
            if number % (runs // 100) == 0:
                known[offset] = content
    return known


def there_and_back(path: Path, size: int, runs: int) -> None:
    known = scattered(path, size, runs)
    subprocess.run(["sync", path], check=True)
    used = usage(path)
    seconds, memory = measured("convert", "--in-place", "-f", "raw", "-O", "qed", path)
    tail = path.stat().st_size - size
    print(
        f"figures: raw of {size >> 30} GiB with {runs} runs to qed: {seconds:.2f} s, {memory:.0f} MiB of memory, "
        f"{tail / MIB:.1f} MiB longer"
    )
    assert memory < 96
    assert usage(path) < used + 65 * MIB + 2 * (path.stat().st_size - size)
    info = json.loads(qemu_img("info", "-f", "qed", "--output=json", path))
    assert info["virtual-size"] == size
    some = dict(list(known.items())[:20])
    qemu_io(path, *[f"read -P {content[0]} {offset} 1" for offset, content in some.items()])
    for offset, content in known.items():
        assert reads(path, offset, len(content)) == content
    seconds, memory = measured("convert", "--in-place", "-f", "qed", "-O", "raw", path)
    print(f"figures: and back: {seconds:.2f} s, {memory:.0f} MiB of memory")
    assert memory < 96
    assert path.stat().st_size == size
    with path.open("rb") as file:
        for offset, content in known.items():
            file.seek(offset)
            assert file.read(len(content)) == content


def reads(path: Path, offset: int, size: int) -> bytes:
    """What the image holds there, for us."""
    import trio

    import qedfuse as package

    async def main() -> bytes:
        async with package.open_image(path, read_only=True) as image:
            return bytes(await image.read(offset, size))

    return trio.run(main)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_gibibytes(tmp_path: Path) -> None:
    there_and_back(tmp_path / "disk", 100 * GIB, 20_000)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_largest_on_this_file_system(tmp_path: Path) -> None:
    """16 TiB are ext4's limit, with blocks of 4 KiB."""
    there_and_back(tmp_path / "disk", 16 * TIB - 256 * MIB, 2_000)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_64_tebibytes(tmp_path: Path) -> None:
    need_guest("mkfs.xfs")
    need_filesystem("xfs")
    disk = tmp_path / "host.raw"
    with disk.open("wb") as file:
        file.truncate(4 * GIB)
    run("mkfs.xfs", "-q", disk)
    with loop_device(disk) as loop, filesystem(loop, tmp_path / "host") as host:
        there_and_back(host / "disk", 64 * TIB, 2_000)
