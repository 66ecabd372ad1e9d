"""A file that lacks a part of its last cluster or table: nothing is dropped, or hidden, that QEMU reads.

`recovery.py` has the rule. QEMU is asked what it reads of each image before qedfuse sees it.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

import pytest

from qedfuse.chain.opening import open_image
from qedfuse.errors import CorruptError
from qedfuse.qed.header import FEATURE_NEED_CHECK
from tests.helpers.images.chains import header_of, our_bytes, qemu_bytes, run
from tests.helpers.judges.check_tools import cli, qemu_check
from tests.helpers.mounts.mounts import mounted
from tests.helpers.qemu.cli import qemu_img, tool

CLUSTER = 4096
SIZE = 8 << 20
#: What is cut off the end: inside of a sector, sectors, clusters, more than a table.
CUTS = [1, 300, 511, 512, 513, 4095, 4096, 4097, 8191, 8192, 8192 + 700, 12288, 12289, 20000]
#: The guest's clusters that are looked at: all that have data, and neighbours.
PLACES = [*range(0, 96 << 10, CLUSTER), *range(4 << 20, (4 << 20) + (32 << 10), CLUSTER)]
BELOW = b"\xb0"


def make(directory: Path, *, backing: bool, last: str) -> Path:
    """A small image whose file ends in data, or in an L2 table (`last`); QEMU puts a table behind its first cluster."""
    image = directory / "disk.qed"
    words = ["-o", "cluster_size=4096,table_size=2"]
    if backing:
        (directory / "base.raw").write_bytes(BELOW * SIZE)
        words += ["-b", str(directory / "base.raw"), "-F", "raw"]
    qemu_img("create", "-q", "-f", "qed", *words, image, SIZE)
    writes = ["write -P 1 0 12k", "write -P 2 4M 4k"]
    if last == "data":
        writes += ["write -P 3 64k 8k", "write -P 5 4100k 4k"]
    tool("qemu-io", "-f", "qed", *[word for line in writes for word in ("-c", line)], image)
    return image


def set_need_check(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(16)
        features = struct.unpack("<Q", file.read(8))[0]
        file.seek(16)
        file.write(struct.pack("<Q", features | FEATURE_NEED_CHECK))


def qemu_reads(image: Path, intact: bytes) -> dict[int, str]:
    """What QEMU says of each cluster: "same" as it was, "other", or "error"."""
    words = [word for at in PLACES for word in ("-c", f"read -P {intact[at]} {at} {CLUSTER}")]
    command = ["qemu-io", "-r", "-f", "qed", *words, str(image)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=60)
    found = re.findall(r"^(Pattern verification failed|read failed|read \d)", done.stdout, re.MULTILINE)
    result = {}
    answers = iter(found)
    for at in PLACES:
        answer = next(answers)
        if answer.startswith("Pattern"):
            next(answers)
        result[at] = {"P": "other", "r": "same"}[answer[0]] if answer != "read failed" else "error"
    assert next(answers, None) is None
    return result


def our_reads(image: Path, *, read_only: bool) -> dict[int, bytes | None]:
    async def read() -> dict[int, bytes | None]:
        found: dict[int, bytes | None] = {}
        async with open_image(image, read_only=read_only) as disk:
            for at in PLACES:
                try:
                    found[at] = bytes(await disk.read(at, CLUSTER))
                except CorruptError:
                    found[at] = None
        return found

    return run(read)


def expect(found: bytes | None, intact: bytes, said: str, cut: int, *, missing: bytes | None) -> None:
    """`missing`: what may be there for what QEMU cannot read; None: an error."""
    if said == "same":
        assert found == intact
    elif said == "other":
        odd = cut % CLUSTER
        assert 0 < odd < 512
        assert found == intact[:-odd] + bytes(odd)
    else:
        assert found == missing


@pytest.mark.parametrize("last", ["data", "table"])
@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("dirty", [False, True])
def test_nothing_that_qemu_reads_is_lost(tmp_path: Path, backing: bool, last: str, dirty: bool) -> None:
    image = make(tmp_path, backing=backing, last=last)
    intact = qemu_bytes(image)
    whole = image.read_bytes()
    refused = 0
    for cut in CUTS:
        image.write_bytes(whole)
        if dirty:
            set_need_check(image)
        os.truncate(image, len(whole) - cut)
        said = qemu_reads(image, intact)
        assert ("error" in said.values()) is (cut >= 512)
        code, counts = qemu_check(image)
        ours = cli("--output=json", image)
        assert ours.returncode == (code if code else 2 * (cut >= 512)), (cut, ours)
        assert f'"corruptions": {counts.get("corruptions", 0)},' in ours.stdout

        before = image.read_bytes()
        for at, found in our_reads(image, read_only=True).items():
            place = intact[at : at + CLUSTER]
            lost = bytes(CLUSTER) if dirty and not backing and found is not None else None
            expect(found, place, said[at], cut, missing=lost)
        assert image.read_bytes() == before

        try:
            opened = our_reads(image, read_only=False)
        except CorruptError:
            opened = None
        if opened is None:
            assert cut >= 512 and (backing or not dirty)
            assert image.read_bytes() == before
            refused += 1
            continue
        for at, found in opened.items():
            place = intact[at : at + CLUSTER]
            if said[at] == "error" and dirty:  # what is there of it is kept
                assert not backing
                assert found is not None
                assert found in (place, bytes(CLUSTER)) or (found.rstrip(b"\0") == place[:1] * (-cut % CLUSTER))
            else:
                expect(found, place, said[at], cut, missing=None)
        assert qemu_check(image)[0] in (0, 3) or not dirty
        now = qemu_bytes(image) if qemu_check(image)[0] in (0, 3) else None
        assert now is None or all(now[at : at + CLUSTER] == content for at, content in opened.items())
    assert bool(refused) is (backing or not dirty)


@pytest.mark.parametrize("cut", [1, 511])
@pytest.mark.parametrize("last", ["data", "table"])
def test_an_incomplete_last_sector_is_no_fault(tmp_path: Path, last: str, cut: int) -> None:
    """Not in check, and nothing is repaired away."""
    image = make(tmp_path, backing=True, last=last)
    whole = image.read_bytes()
    intact = qemu_bytes(image)
    os.truncate(image, len(whole) - cut)
    assert cli(image).returncode == 0
    assert cli("-r", "all", image).returncode == 0
    assert image.read_bytes() == whole[:-cut]
    expected = qemu_bytes(image)
    assert our_bytes(image) == expected
    assert last == "table" or expected != intact or not whole[-1]
    set_need_check(image)
    dirty = image.read_bytes()
    assert our_bytes(image) == expected
    assert image.read_bytes() == dirty
    assert our_reads(image, read_only=False)[0] == b"\1" * CLUSTER
    assert not header_of(image).needs_check
    assert qemu_bytes(image) == expected


@pytest.mark.parametrize("options", [[], ["--ro"]])
@pytest.mark.parametrize("last", ["data", "table"])
def test_through_a_mount(tmp_path: Path, last: str, options: list[str]) -> None:
    """The last sector is read and, if that may be, written."""
    image = make(tmp_path, backing=True, last=last)
    os.truncate(image, image.stat().st_size - 300)
    set_need_check(image)
    expected = bytearray(qemu_bytes(image))
    raw = tmp_path / "disk.raw"
    raw.touch()
    with mounted(image, raw, *options):
        assert raw.read_bytes() == expected
        if not options:
            with raw.open("r+b") as file:
                file.seek(4100 << 10)
                file.write(b"new" * 100)
                file.flush()
                os.fsync(file.fileno())
            expected[4100 << 10 : (4100 << 10) + 300] = b"new" * 100
            assert raw.read_bytes() == expected
    assert qemu_bytes(image) == expected
    assert options or qemu_check(image)[0] == 0


def test_the_cut_off_cluster_of_a_base(tmp_path: Path) -> None:
    """Below an overlay the same holds: the base's last sector shows, and a damaged cluster is an error."""
    base = make(tmp_path, backing=False, last="data")
    whole = base.read_bytes()
    top = tmp_path / "top.qed"
    qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "qed", top)
    raw = tmp_path / "top.raw"
    raw.touch()
    os.truncate(base, len(whole) - 5)
    expected = qemu_bytes(top)
    with mounted(top, raw):
        assert raw.read_bytes() == expected
        with raw.open("r+b", buffering=0) as file:
            file.seek(4100 << 10)
            file.write(b"x")  # copies the cluster up
    assert qemu_bytes(top)[(4100 << 10) + 1 : (4104 << 10)] == expected[(4100 << 10) + 1 : (4104 << 10)]
    assert base.read_bytes() == whole[:-5]
    os.truncate(base, len(whole) - 700)
    with pytest.raises(CorruptError):
        our_bytes(base)
