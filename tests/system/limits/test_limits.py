"""As large, as many and as long as it gets: memory, descriptors and times stay within bounds."""

from __future__ import annotations

import errno
import os
import random
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import Header
from tests.bench.measures import mapped_terabyte
from tests.bench.targets import QedFuse
from tests.helpers.judges.ledger import Files, Ledger
from tests.helpers.mounts import filing
from tests.helpers.mounts.guests import assert_clean, filesystem, loop_device, need_filesystem, need_guest, run
from tests.helpers.mounts.modes import MODES, NATIVE, Mode
from tests.helpers.mounts.mounts import find_daemon, kill, mounted, need_fuse, wait_for_exit, wait_until
from tests.helpers.mounts.victims import victims
from tests.helpers.qemu.cli import Result, one_line, qedfuse, qemu_img, qemu_io

#: Of the long test of a guest.
LOAD_SECONDS = float(os.environ.get("QEDFUSE_LOAD_SECONDS") or 180)

MIB = 1 << 20
TIB = 1 << 40


def peak_memory(pid: int) -> float:
    """The most that a process has ever had resident, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# -- long --------------------------------------------------------------------------------------------------------------


def hold_a_guest(directory: Path, mode: Mode, seconds: float, *, overlay: bool) -> None:
    """An ext4 with eight writers, which all want their data to be safe; then everything must be right."""
    need_guest("mkfs.ext4", "e2fsck")
    need_filesystem("ext4")
    image, raw, guest = directory / "disk.qed", directory / "disk.raw", directory / "guest"
    raw.touch()
    options: list[str | Path] = []
    if overlay:
        base = directory / "base.raw"
        base.write_bytes(random.Random(1).randbytes(64 * MIB))
        options = ["-b", base, "-F", "raw"]
    run("qemu-img", "create", "-q", "-f", "qed", *options, image, "512M")
    size = 128 * MIB
    ledger, files = Ledger(7, bytes(size)), Files(7)

    with mounted(*mode, image, raw) as mount:
        pid = find_daemon(raw)
        with loop_device(raw) as loop:
            run("mkfs.ext4", "-q", "-F", loop)
            with filesystem(loop, guest), victims() as writers:
                (guest / "files").mkdir()
                with (guest / "disk").open("wb") as disk:
                    disk.truncate(size)
                writers.write(guest / "disk", ledger, holes=True)
                for number in range(4):
                    writers.start(filing.__file__, guest / "files", 7, number, hear=files.hear)
                writers.watch(seconds)
                writers.stop()
                ledger.settle((guest / "disk").read_bytes())
                files.settle(guest / "files")
            with filesystem(loop, guest):
                ledger.settle((guest / "disk").read_bytes())
                files.settle(guest / "files")
            run("e2fsck", "-fn", loop)
        memory = peak_memory(pid)
        print(
            f"figures: {ledger.acknowledged} writes, {files.count} files in {seconds:.0f} s, {memory:.0f} MiB at most"
        )
        assert "ERROR" not in mount.text() and "WARNING" not in mount.text(), mount.text()
    assert memory < 128
    assert_clean(image)


@pytest.mark.guest
@MODES
def test_a_guest_under_load(tmp_path: Path, mode: Mode) -> None:
    hold_a_guest(tmp_path, mode, 8, overlay=mode == NATIVE)


@pytest.mark.slow
@pytest.mark.guest
@pytest.mark.timeout(300 + 2 * LOAD_SECONDS)
@MODES
@pytest.mark.parametrize("overlay", [False, True], ids=["plain", "overlay"])
def test_a_guest_under_load_for_minutes(tmp_path: Path, mode: Mode, overlay: bool) -> None:
    hold_a_guest(tmp_path, mode, LOAD_SECONDS, overlay=overlay)


# -- many --------------------------------------------------------------------------------------------------------------

IMAGES = 5000
OPENED = 300


def make_directories(tmp_path: Path, images: int) -> tuple[Path, Path]:
    """A source directory and a mountpoint. The images are empty; their sizes tell them apart."""
    need_fuse()
    directory, point = tmp_path / "images", tmp_path / "raw"
    directory.mkdir()
    point.mkdir()
    geometry = Geometry()
    cluster = geometry.cluster_size
    for number in range(images):
        header = Header(cluster, geometry.table_size, 1, 0, 0, 0, cluster, MIB + 512 * number)
        with (directory / f"{number:04}.qed").open("wb") as file:
            file.write(header.encode())
            file.truncate(cluster + geometry.table_bytes)
    return directory, point


@contextmanager
def soft_limit_of_descriptors(number: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@MODES
def test_thousands_of_images_in_a_directory(tmp_path: Path, mode: Mode) -> None:
    source, point = make_directories(tmp_path, IMAGES)
    names = [f"{number:04}.raw" for number in range(IMAGES)]
    rnd = random.Random(3)
    chosen = rnd.sample(range(IMAGES), OPENED)

    with ExitStack() as stack:
        with soft_limit_of_descriptors(256):
            stack.enter_context(mounted(*mode, source, point))
        pid = find_daemon(point)
        before = descriptors(pid)
        times = []
        for _ in range(2):
            started = time.monotonic()
            with os.scandir(point) as entries:
                sizes = {entry.name: entry.stat().st_size for entry in entries}
            times.append(time.monotonic() - started)
            assert sizes == {name: MIB + 512 * number for number, name in enumerate(names)}
        assert descriptors(pid) <= before + 5  # a listing opens no image for good
        print(f"figures: {IMAGES} images listed in {times[0]:.2f} s, again in {times[1]:.2f} s")
        assert times[0] < 5

        started = time.monotonic()
        files = []
        try:
            for number in chosen:
                file = (point / names[number]).open("r+b", buffering=0)
                files.append(file)
                os.pwrite(file.fileno(), b"%04d" % number * 128, 64 * number)
            opened = time.monotonic() - started
            print(f"figures: {OPENED} opened and written in {opened:.2f} s, {descriptors(pid)} descriptors")
            assert descriptors(pid) < before + 2 * OPENED
            for file in files:
                os.fsync(file.fileno())
        finally:
            for file in files:
                file.close()
        wait_until(lambda: descriptors(pid) <= before + 5)  # they are closed when nobody uses them
        for number in rnd.sample(chosen, 50):
            assert (point / names[number]).read_bytes()[64 * number :][:512] == b"%04d" % number * 128
        memory = peak_memory(pid)
        print(f"figures: {memory:.0f} MiB resident at most")
        assert memory < 128
        assert opened < 15
    for number in chosen[:5]:
        qemu_io(source / f"{number:04}.qed", f"read -P {ord(f'{number:04}'[0])} {64 * number} 1")
        assert_clean(source / f"{number:04}.qed")


@pytest.mark.slow
@pytest.mark.timeout(900)
@MODES
def test_thousands_of_images_open_at_once(tmp_path: Path, mode: Mode) -> None:
    source, point = make_directories(tmp_path, IMAGES)
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < IMAGES + 100:
        pytest.skip(f"a process may have no more than {hard} files open here")
    with mounted(*mode, source, point), soft_limit_of_descriptors(hard):
        pid = find_daemon(point)
        before = descriptors(pid)
        started = time.monotonic()
        with ExitStack() as stack:
            files = [
                stack.enter_context((point / f"{number:04}.raw").open("r+b", buffering=0)) for number in range(IMAGES)
            ]
            print(f"figures: {IMAGES} opened in {time.monotonic() - started:.1f} s, {descriptors(pid)} descriptors")
            assert descriptors(pid) <= before + IMAGES + 5
            for number, file in enumerate(files):
                os.pwrite(file.fileno(), b"%04d" % number * 128, 4096)
            for file in files:
                os.fsync(file.fileno())
            print(f"written and synced in {time.monotonic() - started:.1f} s, {peak_memory(pid):.0f} MiB resident")
            for number, file in enumerate(files):
                assert os.pread(file.fileno(), 4, 4096) == b"%04d" % number
        wait_until(lambda: descriptors(pid) <= before + 5, 60)
        assert peak_memory(pid) < 96 + 0.025 * IMAGES
    for number in range(0, IMAGES, 500):
        assert_clean(source / f"{number:04}.qed")


def open_until_none_is_left(point: Path, stack: ExitStack) -> list[int]:
    """Open images, of which the daemon may have few at a time, until it refuses one more."""
    daemon = find_daemon(point)
    left = descriptors(daemon) + 20
    resource.prlimit(daemon, resource.RLIMIT_NOFILE, (left, left))
    opened: list[int] = []
    for path in sorted(point.iterdir()):
        try:
            opened.append(os.open(path, os.O_RDWR))
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            return opened
        stack.enter_context(suppress(OSError))  # the mount may be dead by then
        stack.callback(os.close, opened[-1])
    raise AssertionError("all could be opened")


def test_no_descriptors_left(tmp_path: Path) -> None:
    """Who has an image open goes on, who asks is answered, and others can be opened again later."""
    source, point = make_directories(tmp_path, 40)
    with mounted(source, point) as mount:
        pid = find_daemon(point)
        before = descriptors(pid)
        with ExitStack() as stack:
            for number, fd in enumerate(open_until_none_is_left(point, stack)):
                os.pwrite(fd, b"%04d" % number * 128, 4096)
                os.fsync(fd)
            for _ in range(3):
                assert qedfuse("status", point).code == 0
            one_line(mount.umount(), 1, "in use")
        wait_until(lambda: descriptors(pid) <= before + 1)
        for number, content in ((0, b"0000"), (5, b"0005"), (39, bytes(4))):
            assert (point / f"{number:04}.raw").read_bytes()[4096:][:4] == content
        assert mount.umount() == Result(0, "", "")
        assert "internal error" not in mount.text() and "Traceback" not in mount.text(), mount.text()


def test_a_signal_when_no_descriptors_are_left(tmp_path: Path) -> None:
    """Everything is flushed and closed all the same."""
    source, point = make_directories(tmp_path, 40)
    with mounted("-o", "direct_io", source, point) as mount:
        daemon = find_daemon(point)
        with ExitStack() as stack:
            opened = open_until_none_is_left(point, stack)
            for fd in opened:
                os.pwrite(fd, b"written" * 100, 4096)
            kill(daemon)
            wait_until(lambda: "serving until that ends" in mount.text())
            kill(daemon)
            wait_for_exit(daemon)
        assert "internal error" not in mount.text() and "Traceback" not in mount.text(), mount.text()
    for number in range(len(opened)):
        assert_clean(source / f"{number:04}.qed")
    qemu_io(source / "0000.qed", f"read -P {ord('w')} 4096 1")


# -- large -------------------------------------------------------------------------------------------------------------


@MODES
def test_64_tebibytes_mount_at_once(tmp_path: Path, mode: Mode) -> None:
    image, raw = tmp_path / "disk.qed", tmp_path / "disk.raw"
    raw.touch()
    small = tmp_path / "small.qed"
    sizes = {small: MIB, image: 64 * TIB}
    times: dict[Path, list[float]] = {path: [] for path in sizes}
    for path, size in sizes.items():
        qemu_img("create", "-q", "-f", "qed", path, str(size))
    for path in [small, image] * 4:
        started = time.monotonic()
        with mounted(*mode, path, raw):
            times[path].append(time.monotonic() - started)
            assert raw.stat().st_size == sizes[path]
    seconds, of_small = min(times[image]), min(times[small])
    print(f"figures: 64 TiB mounted in {seconds:.2f} s, 1 MiB in {of_small:.2f} s")
    assert seconds < 1.5 * of_small  # interpreter's start and all

    rnd = random.Random(5)
    places = {rnd.randrange(64 * TIB // 4096) * 4096: rnd.randbytes(4096) for _ in range(200)}
    places[64 * TIB - 4096] = rnd.randbytes(4096)
    with mounted(*mode, image, raw):
        with raw.open("r+b", buffering=0) as file:
            for offset, data in places.items():
                os.pwrite(file.fileno(), data, offset)
            os.fsync(file.fileno())
        memory = peak_memory(find_daemon(raw))
        assert memory < 96, memory
    assert_clean(image)
    with mounted("--ro", *mode, image, raw), raw.open("rb", buffering=0) as file:
        for offset, data in places.items():
            assert os.pread(file.fileno(), 4096, offset) == data
            assert os.pread(file.fileno(), 4096, offset ^ (1 << 40)) in (bytes(4096), places.get(offset ^ (1 << 40)))
    commands = [f"read -P {data[0]} {offset} 1" for offset, data in places.items()]
    qemu_io(image, *commands[-50:])


@MODES
def test_random_reads_of_a_mapped_tebibyte_need_little_memory(tmp_path: Path, mode: Mode) -> None:
    target = QedFuse(tmp_path)
    mapped_terabyte(target)
    raw = tmp_path / "disk.raw"
    raw.touch()

    def read(seed: int) -> None:
        rnd = random.Random(seed)
        fd = os.open(raw, os.O_RDONLY | os.O_DIRECT)
        try:
            for _ in range(5000):
                assert len(os.pread(fd, 4096, rnd.randrange(TIB // 4096) * 4096)) == 4096
        finally:
            os.close(fd)

    with mounted(*mode, target.image, raw):
        started = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, range(4)))
        memory = peak_memory(find_daemon(raw))
        print(f"20000 reads in {time.monotonic() - started:.1f} s, {memory:.0f} MiB resident at most")
        assert memory < 96
