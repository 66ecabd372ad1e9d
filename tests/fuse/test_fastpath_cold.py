"""The fast path when the host has not at hand what is asked for: table pages and data come in, or Python gets the
request; whatever happens, it reads and writes the same."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from tests.helpers.doubles.nowait import unwilling
from tests.helpers.mounts.modes import NEEDS_NATIVE
from tests.helpers.mounts.mounts import counters, mounted
from tests.helpers.qemu.cli import qedfuse, qemu_img, qemu_io

pytestmark = NEEDS_NATIVE

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def chain(tmp_path: Path, rnd: random.Random) -> tuple[Path, list[Path], bytearray]:
    """An image over a QED image over a raw file, 8 MiB, each with something of its own. The image, all files, what it
    reads as."""
    content = bytearray(rnd.randbytes(8 * MIB))
    base, middle, top = tmp_path / "base.raw", tmp_path / "middle.qed", tmp_path / "top.qed"
    base.write_bytes(content)
    options = ["-o", "cluster_size=4096,table_size=2"]
    qemu_img("create", "-q", "-f", "qed", *options, "-b", base, "-F", "raw", middle, "8M")
    qemu_img("create", "-q", "-f", "qed", *options, "-b", middle, "-F", "qed", top, "8M")
    for image in (middle, top):
        for _ in range(40):
            offset, size, value = rnd.randrange(2000) * 4096, rnd.randrange(1, 9) * 4096, rnd.randrange(1, 256)
            qemu_io(image, f"write -q -P {value} {offset} {size}")
            content[offset : offset + size] = bytes([value]) * len(content[offset : offset + size])
    return top, [base, middle, top], content


def forget(*files: Path) -> None:
    """The host has nothing of these files in memory, if it can be talked into it."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def test_a_real_disk(tmp_path: Path, raw: Path) -> None:
    """Which may have all in its memory, or be slow: who has answered is not to be foreseen, but what."""
    rnd = random.Random(1)
    image, files, content = chain(tmp_path, rnd)
    with mounted(image, raw, "-o", "direct_io"), raw.open("rb", buffering=0) as file:
        for _ in range(20):
            forget(*files)
            for _ in range(20):
                offset, size = rnd.randrange(8 * MIB), rnd.randrange(1, 20_000)
                assert os.pread(file.fileno(), size, offset) == content[offset : offset + size]
        found = counters(raw)
    print(
        f"figures: 400 reads, of which {found['waits']} waited for the disk, {found['waits'] - found['waited']} in vain"
    )


@pytest.mark.parametrize(("refused", "shortened"), [(128, 64), (230, 20)])
def test_a_host_that_has_it_now_and_then(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, refused: int, shortened: int
) -> None:
    """Several clients at once, each in a part of its own, read and write; and the image is what they have written."""
    image, _files, content = chain(tmp_path, random.Random(2))
    unwilling(monkeypatch, tmp_path, refused=refused, shortened=shortened)
    clients, part = 6, 8 * MIB // 6
    problems: list[str] = []

    def client(number: int) -> None:
        rnd = random.Random(number)
        fd = os.open(raw, os.O_RDWR)
        try:
            for turn in range(300):
                size = rnd.choice([512, 4096, 5000, 70_000])
                offset = number * part + rnd.randrange(part - size)
                if rnd.random() < 0.3:
                    data = rnd.randbytes(size) if rnd.random() < 0.8 else bytes(size)
                    assert os.pwrite(fd, data, offset) == size
                    content[offset : offset + size] = data
                elif os.pread(fd, size, offset) != content[offset : offset + size]:
                    problems.append(f"client {number}, turn {turn}: {size} bytes at {offset}")
                if turn % 50 == 49:
                    os.fsync(fd)
        except Exception as error:
            problems.append(f"client {number}: {error!r}")
        finally:
            os.close(fd)

    with mounted(image, raw, "-o", "direct_io"):
        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = counters(raw)
        assert raw.read_bytes() == content
    assert problems == []
    assert found["waited"] > 10, found
    assert found["waits"] > found["waited"], found
    monkeypatch.delenv("LD_PRELOAD")
    qemu_img("check", "-q", image)
    flat = tmp_path / "flat"
    qemu_img("convert", "-f", "qed", "-O", "raw", image, flat)
    assert flat.read_bytes() == content


def test_a_slow_disk_is_soon_left_to_python(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rnd = random.Random(3)
    image, _files, content = chain(tmp_path, rnd)
    unwilling(monkeypatch, tmp_path, refused=256)
    with mounted(image, raw, "-o", "direct_io"), raw.open("rb", buffering=0) as file:
        before = counters(raw)
        for _ in range(300):
            offset = rnd.randrange(8 * MIB)
            assert os.pread(file.fileno(), 4096, offset) == content[offset : offset + 4096]
        after = counters(raw)
    assert after["missed"] - before["missed"] == 300
    assert after["waits"] - before["waits"] < 30
    assert after["waited"] == 0


def test_more_tables_than_there_is_room_for(tmp_path: Path, raw: Path) -> None:
    """Pages come and go between and within requests, clean ones and such as have just been changed."""
    rnd = random.Random(4)
    size = 64 * GIB
    base, image = tmp_path / "base.qed", tmp_path / "disk.qed"
    options = ["-o", "cluster_size=4096,table_size=16"]
    qemu_img("create", "-q", "-f", "qed", *options, base, str(size))
    written: dict[int, bytes] = {}
    spots = [rnd.randrange(size // (2 * MIB)) * 2 * MIB + 4096 * rnd.randrange(500) for _ in range(6000)]

    def write(count: int) -> None:
        fd = os.open(raw, os.O_RDWR)
        for number in range(count):
            # Near others, too, so that pages are changed that may have left; over the end of a page now and then.
            offset = rnd.choice(spots) + rnd.choice([0, 512, 4096, 8 * 4096])
            data = rnd.randbytes(512)
            os.pwrite(fd, data, offset)
            written[offset] = data
            if rnd.random() < 0.3:
                known = rnd.choice(spots)
                assert os.pread(fd, 512, known) == written.get(known, bytes(512)), number
        os.close(fd)

    with mounted(base, raw, "-o", "direct_io"):
        write(6000)
    qemu_img("create", "-q", "-f", "qed", *options, "-b", base, "-F", "qed", image, str(size))
    with mounted(image, raw, "-o", "direct_io"):
        write(6000)
        assert counters(raw)["writes"] > 3000
    # QEMU's check counts a few leaks with so many tables of this size, in images of its own making, too.
    assert qedfuse("check", image).code == 0
    with mounted(image, raw, "--ro", "--no-fastpath"):
        fd = os.open(raw, os.O_RDONLY)
        wrong = [offset for offset, data in written.items() if os.pread(fd, 512, offset) != data]
        os.close(fd)
    assert wrong == []
