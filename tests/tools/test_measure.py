"""`qedfuse measure`: to the byte what `convert` makes, in qemu-img's words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qedfuse.cli.main import main
from tests.helpers.images.conversions import CHAINS, GEOMETRIES, MIB, chain_names, make_chain
from tests.helpers.qemu.cli import one_line, qedfuse, qemu_img


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def measure(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, int]:
    assert main(["measure", "--output=json", *map(str, words)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    found = json.loads(out)
    return found["required"], found["fully-allocated"]


@pytest.mark.parametrize("chain", CHAINS, ids=chain_names(CHAINS))
@pytest.mark.parametrize(("cluster", "table"), [*GEOMETRIES, (16 * MIB, 1)])
def test_as_convert_makes_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], chain: list[tuple[str, int]], cluster: int, table: int
) -> None:
    source = make_chain(tmp_path, *chain, seed=table)
    words = ("-f", source.suffix[1:], "-O", "qed", "-o", f"cluster_size={cluster},table_size={table}")
    required, full = measure(capfd, *words, source)
    for size, more in ((required, ()), (full, ("-S", "0"))):
        assert main(["convert", *words, *more, str(source), "out.qed"]) == 0
        capfd.readouterr()
        assert (tmp_path / "out.qed").stat().st_size == size, more


@pytest.mark.parametrize("chain", CHAINS, ids=chain_names(CHAINS))
def test_a_raw_target_as_qemu_img_has_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], chain: list[tuple[str, int]]
) -> None:
    source = make_chain(tmp_path, *chain)
    words = ("measure", "-f", source.suffix[1:], "-O", "raw")
    for output in ("--output=json", "--output=human"):
        assert main([*words, output, str(source)]) == 0
        assert capfd.readouterr().out == qemu_img(*words, output, source)
    assert main(["convert", *words[1:], str(source), "out"]) == 0
    assert measure(capfd, *words[1:], source)[0] == (tmp_path / "out").stat().st_size


@pytest.mark.parametrize("size", ["0", "1", "1000", "1M", "3.5G", "0x1234"])
def test_an_empty_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str], size: str) -> None:
    assert main(["measure", "--size", size]) == 0
    assert capfd.readouterr().out == qemu_img("measure", "-O", "raw", "--size", size)
    required, full = measure(capfd, "-O", "qed", "--size", size)
    assert main(["create", "-q", "new.qed", size]) == 0
    assert (tmp_path / "new.qed").stat().st_size == required <= full


@pytest.mark.parametrize("size", [512, 4096, 1 << 20, (1 << 20) + 512, 5 << 20])
def test_a_full_one(tmp_path: Path, capfd: pytest.CaptureFixture[str], size: int) -> None:
    words = ("-O", "qed", "-o", "cluster_size=4k,table_size=1")
    (tmp_path / "full.raw").write_bytes(b"x" * size)
    required, full = measure(capfd, "-f", "raw", *words, "full.raw")
    assert measure(capfd, *words, "--size", size)[1] == required == full
    assert main(["convert", "-f", "raw", *words, "full.raw", "out.qed"]) == 0
    capfd.readouterr()
    assert (tmp_path / "out.qed").stat().st_size == full


@pytest.mark.parametrize("place", [0, 4095, 4096, 65535])
def test_one_byte_in_a_cluster_that_is_stored(tmp_path: Path, capfd: pytest.CaptureFixture[str], place: int) -> None:
    """Where it begins with zeroes, the rest is looked at."""
    disk = bytearray(b"x" * 65536 + bytes(2 * 65536) + b"x" * 65536)
    disk[65536 + place] = 1
    (tmp_path / "disk").write_bytes(disk)
    assert measure(capfd, "-f", "raw", "-O", "qed", "disk")[0] == 65536 * (1 + 4 + 4 + 3)


def test_the_largest_disk_at_once(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qed", "large.qed", "64T", cwd=tmp_path)
    assert measure(capfd, "-O", "qed", "large.qed") == (5 * 65536, 65536 * (5 + (1 << 15) * 4 + (1 << 30)))


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ((), 2, "either IMAGE or --size"),
        (("--size", "1M", "a"), 2, "either IMAGE or --size"),
        (("--size", "1M", "-f", "raw"), 2, "excludes --size"),
        (("--size", "1x"), 2, "is no size"),
        (("--size", "-1"), 2, "is no size"),
        (("-O", "qcow2", "--size", "1M"), 2, "'qcow2'"),
        (("-o", "cluster_size=4k", "--size", "1M"), 2, "unknown option"),
        (("-O", "qed", "-o", "table_size=3", "--size", "1M"), 2, "table size 3"),
        (("-O", "qed", "-o", "cluster_size=4k,table_size=1", "--size", "2G"), 1, "all that cluster_size=4096"),
        (("nothing",), 1, "no such file"),
        ((".",), 1, "is a directory"),
    ],
)
def test_refusals(words: tuple[str, ...], code: int, part: str) -> None:
    one_line(qedfuse("measure", *words), code, part)
