"""`qedfuse convert --reflink`: what can be shared with the source is not copied, and the guest's bytes are the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from qedfuse.tools.convert import convert_image
from qedfuse.tools.convert_sharing import Reflink
from tests.helpers.images.conversions import MIB, endless, flat, make_chain, qemu_finds_no_error, usage
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.guests import filesystem, need_guest
from tests.helpers.mounts.hosts import host_of, shared, used
from tests.helpers.qemu.cli import TIMEOUT, environment, one_line, qedfuse, qemu_img, qemu_io

GIB = 1 << 30
BLOCK = 4096
#: What a file system may take for the metadata of a copy.
METADATA = 2 * MIB


@pytest.fixture(scope="module", params=["btrfs", "xfs"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that can share blocks."""
    with host_of(request.param, tmp_path_factory.mktemp("host") / "disk", 700 * MIB) as point:
        yield point


@pytest.fixture
def place(host: Path, tmp_path: Path) -> Iterator[Path]:
    """An empty directory on it."""
    place = host / tmp_path.name
    place.mkdir()
    yield place
    subprocess.run(["rm", "-r", str(place)], check=True)


def convert(*words: object) -> None:
    done = qedfuse("convert", *map(str, words))
    assert done == (0, "", ""), done


def same(one: Path, other: Path) -> None:
    """What guests see: QEMU is the judge."""
    formats = [path.suffix[1:] for path in (one, other)]
    assert "identical" in qemu_img("compare", "-f", formats[0], "-F", formats[1], one, other)
    for path in (one, other):
        if path.suffix == ".qed":
            qemu_finds_no_error(path)
            assert qedfuse("check", "-q", path).code == 0


def raw_source(path: Path, size: int = 40 * MIB) -> Path:
    """Random data (26 MiB), zeroes that are stored (4 MiB), and holes."""
    with path.open("wb") as file:
        file.write(random.Random(1).randbytes(16 * MIB) + bytes(4 * MIB))
        file.seek(size // 2 + 5 * BLOCK)
        file.write(random.Random(2).randbytes(10 * MIB))
        file.truncate(size)
    return path


def filled(path: Path, *options: str) -> Path:
    qemu_img("create", "-q", "-f", path.suffix[1:], *options, path, "40M")
    return written(path, (0, 14 * MIB), (20 * MIB, 3 * MIB), (39 * MIB + 17 * 512, MIB - 17 * 512))


def written(path: Path, *ranges: tuple[int, int]) -> Path:
    commands = [f"write -q -P {7 + number} {start} {size}" for number, (start, size) in enumerate(ranges)]
    qemu_io(path, *commands, format=path.suffix[1:])
    return path


# -- what is shared ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["out.qed", "out.raw"])
@pytest.mark.parametrize("source", ["raw", "qed", "qcow2"])
@pytest.mark.parametrize("reflink", ["auto", "always"])
def test_nearly_all_is_shared(place: Path, source: str, target: str, reflink: str) -> None:
    """No space is taken, and what is written to either file later is its own."""
    path = place / f"source.{source}"
    one = raw_source(path) if source == "raw" else filled(path)
    data = usage(one)
    run_sync(one)
    before = used(place)
    convert("-f", source, "-O", target[-3:], f"--reflink={reflink}", one, place / target)
    same(one, place / target)
    assert used(place) - before < METADATA
    assert shared(place / target) >= data - 2 * MIB
    content = flat(place / target).read_bytes()
    written(one, (0, 2 * MIB), (MIB * 22, MIB))
    assert flat(place / target).read_bytes() == content
    again = flat(one).read_bytes()
    written(place / target, (MIB, 2 * MIB))
    assert flat(one).read_bytes() == again


def run_sync(path: Path) -> None:
    subprocess.run(["sync", str(path)], check=True)


def test_never_is_never(place: Path) -> None:
    one = raw_source(place / "source.raw")
    before = used(place)
    convert("-f", "raw", "-O", "qed", "--reflink=never", one, place / "out.qed")
    same(one, place / "out.qed")
    assert shared(place / "out.qed") == 0
    assert used(place) - before > 20 * MIB


def test_zeroes_are_not_looked_for(place: Path) -> None:
    """What is shared is as the source has it; with -S 0 all is stored, and nothing shared."""
    one = raw_source(place / "source.raw")
    for target in ("out.raw", "out.qed"):
        convert("-f", "raw", "-O", target[-3:], one, place / target)
        assert shared(place / target) >= 30 * MIB - BLOCK
        convert("-f", "raw", "-O", target[-3:], "-S", "0", one, place / target)
        same(one, place / target)
        assert shared(place / target) == 0
        assert usage(place / target) >= one.stat().st_size


@pytest.mark.parametrize("options", ["cluster_size=4k,table_size=2", "cluster_size=2M,table_size=8"])
def test_whatever_the_clusters(place: Path, options: str) -> None:
    """Small tables, many of them; and clusters of which only a part is shared, the rest being a hole."""
    one = raw_source(place / "source.raw", 40 * MIB + 333)
    convert("-f", "raw", "-O", "qed", "-o", options, "--reflink=always", one, place / "out.qed")
    same(one, place / "out.qed")
    assert shared(place / "out.qed") > 28 * MIB
    assert usage(place / "out.qed") < usage(one) + MIB
    convert("-O", "raw", "--reflink=always", place / "out.qed", place / "back.raw")
    same(one, place / "back.raw")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", ["qed", "raw"])
def test_all_images_of_a_chain(place: Path, target: str, seed: int) -> None:
    """Ends inside blocks, overlays of half a cluster: copied; the rest of each file is shared."""
    one = make_chain(place, ("raw", 5 * MIB + 333), ("qcow2", 7 * MIB), ("qed", 6 * MIB + 512), seed=10 * seed)
    out = place / f"out.{target}"
    convert("-f", "qed", "-O", target, one, out)
    same(flat(one).rename(place / "flat.raw"), out)
    assert shared(out) > MIB


def test_compressed_clusters_are_copied(place: Path) -> None:
    plain = filled(place / "plain.qcow2")
    one = place / "source.qcow2"
    qemu_img("convert", "-c", "-f", "qcow2", "-O", "qcow2", plain, one)
    written(one, (30 * MIB, 4 * MIB))
    convert("-f", "qcow2", "-O", "qed", "--reflink=always", one, place / "out.qed")
    same(one, place / "out.qed")
    assert 4 * MIB <= shared(place / "out.qed") < 6 * MIB


def test_n_fills_a_file_and_shares_with_it(place: Path) -> None:
    one = raw_source(place / "source.raw")
    junk = os.urandom(44 * MIB)
    (place / "out.raw").write_bytes(junk)
    convert("-n", "-f", "raw", "-O", "raw", "--reflink=always", one, place / "out.raw")
    assert (place / "out.raw").read_bytes() == one.read_bytes() + junk[40 * MIB :]
    assert shared(place / "out.raw") >= 20 * MIB


def test_what_is_seen_of_it(place: Path) -> None:
    """`info` tells how much of an image other files have."""
    one = raw_source(place / "source.raw")
    convert("-f", "raw", "-O", "qed", one, place / "out.qed")
    found = json.loads(qedfuse("info", "--output=json", place / "out.qed").out)
    assert found["shared-size"] == shared(place / "out.qed") > 20 * MIB
    assert found["shared-size-complete"] is True
    assert "\nshared with other files: 30 MiB\n" in qedfuse("info", place / "out.qed").out
    one.unlink()
    run_sync(place / "out.qed")
    subprocess.run(["sync", "-f", str(place)], check=True)
    assert "shared" not in qedfuse("info", place / "out.qed").out


# -- what cannot be shared ---------------------------------------------------------------------------------------------


def test_onto_another_file_system(place: Path, tmp_path: Path) -> None:
    one = raw_source(place / "source.raw")
    for target in ("out.qed", "out.raw"):
        out = tmp_path / target
        done = qedfuse("convert", "-f", "raw", "-O", target[-3:], "--reflink=always", one, out)
        one_line(done, 1, str(out), str(one), "different file systems", "--reflink=auto")
        assert not out.exists()
        convert("-f", "raw", "-O", target[-3:], one, out)
        same(one, out)


def test_where_there_is_no_such_thing(tmp_path: Path) -> None:
    """A file that was there is empty then, as after any failure."""
    need_guest()
    with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs") as point:
        one, out = raw_source(point / "source.raw"), point / "out.qed"
        out.write_bytes(b"x" * MIB)
        done = qedfuse("convert", "-f", "raw", "-O", "qed", "--reflink=always", one, out)
        one_line(done, 1, str(out), str(one), "no shared blocks", "--reflink=auto")
        assert out.stat().st_size == 0
        convert("-f", "raw", "-O", "qed", one, out)
        same(one, out)


def test_one_file_of_a_chain_lies_elsewhere(place: Path, tmp_path: Path) -> None:
    base = raw_source(tmp_path / "base.raw")
    top = place / "top.qed"
    qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "raw", top)
    written(top, (2 * MIB, 5 * MIB))
    convert("-f", "qed", "-O", "raw", top, place / "out.raw")
    same(top, place / "out.raw")
    assert 4 * MIB < shared(place / "out.raw") < 6 * MIB
    done = qedfuse("convert", "-f", "qed", "-O", "raw", "--reflink=always", top, place / "other.raw")
    one_line(done, 1, str(base), "different file systems")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-O", "raw", "-S", "0"], "-S 0 stores everything"),
        (["-O", "qed", "-n"], "(-n) is written, not replaced"),
        (["-O", "qed", "-B", "below.raw", "-F", "raw"], "a backing file"),
    ],
)
def test_what_excludes_it(tmp_path: Path, words: list[str], reason: str) -> None:
    (tmp_path / "source.raw").write_bytes(bytes(MIB))
    one_line(qedfuse("convert", "--reflink=always", *words, "source.raw", "out", cwd=tmp_path), 2, reason)
    assert not (tmp_path / "out").exists()


def test_clusters_that_do_not_lie_alike(place: Path) -> None:
    """Those of a qcow2 image can be smaller than blocks: these are copied, or else refused."""
    one = place / "source.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", one, "4M")
    written(one, (0, 300 * 512), (MIB, 77 * 512), (2 * MIB, 64 * BLOCK))
    convert("-f", "qcow2", "-O", "raw", one, place / "out.raw")
    same(one, place / "out.raw")


# -- bad ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["out.qed", "out.raw"])
@pytest.mark.parametrize("reflink", list(Reflink))
def test_the_source_shrinks_meanwhile(place: Path, target: str, reflink: Reflink) -> None:
    """It is read from no further than it is long, and the target is gone."""
    one = place / "source.raw"
    with one.open("wb") as file:
        file.write(os.urandom(4 * MIB))
        file.seek(100 * MIB)
        file.write(os.urandom(4 * MIB))

    def shrink(done: int, total: int) -> None:
        os.truncate(one, 50 * MIB)

    async def main() -> None:
        with raises_errno(5):
            await convert_image(
                str(one),
                str(place / target),
                source_format="raw",
                target_format=target[-3:],
                reflink=reflink,
                progress=shrink,
            )

    trio.run(main)
    assert not (place / target).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("reflink", ["auto", "never"])
def test_a_signal_ends_it(place: Path, reflink: str, number: signal.Signals) -> None:
    """In the middle of what would take minutes: the target is gone, at once."""
    one = endless(place, os.urandom(4096))
    out = place / "out.raw"
    words = ["convert", "-p", f"--reflink={reflink}", "-O", "raw", str(one), str(out)]
    with subprocess.Popen(
        [sys.executable, "-m", "qedfuse", *words], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        while not out.exists() or out.stat().st_blocks == 0:
            assert process.poll() is None
        process.send_signal(number)
        _out, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, said) == (128 + number, b"")
    assert not out.exists()


@pytest.mark.parametrize("target", ["out.qed", "out.raw"])
def test_no_space(tmp_path: Path, target: str) -> None:
    """A new file is gone, one that was there is empty."""
    need_guest()
    one = raw_source(tmp_path / "source.raw")
    with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs", "-o", f"size={8 * MIB}") as point:
        out = point / target
        for existed in (False, True):
            if existed:
                out.write_bytes(b"x")
            done = qedfuse("convert", "-f", "raw", "-O", target[-3:], one, out)
            one_line(done, 1, str(out), "o space left")
            assert out.exists() is existed
            assert not existed or out.stat().st_size == 0


# -- much --------------------------------------------------------------------------------------------------------------


def test_100_gib(place: Path) -> None:
    """What takes no space takes hardly any time: data here and there, the rest holes."""
    one = place / "source.raw"
    with one.open("wb") as file:
        for number in range(100):
            file.seek(number * GIB + number * BLOCK)
            file.write(os.urandom(MIB))
        file.truncate(100 * GIB)
    run_sync(one)
    before = used(place)
    convert("-f", "raw", "-O", "qed", "--reflink=always", one, place / "out.qed")
    convert("-f", "qed", "-O", "raw", "--reflink=always", place / "out.qed", place / "back.raw")
    assert used(place) - before < 32 * MIB
    same(one, place / "out.qed")
    same(one, place / "back.raw")
