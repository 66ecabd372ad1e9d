"""Which targets take part in the benchmark, and in which rows; how another system's QEMU is found and started."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from tests.bench.__main__ import choose
from tests.bench.qemu_root import Peer, newest, parse_version, peers, program
from tests.bench.targets import ALL, NbdFuse, QedFuse, QedFusePython, RawFile, StorageDaemon, Target, iothreads
from tests.bench.workloads import ROWS

LIBRARIES = "usr/lib/x86_64-linux-gnu"


def make_root(root: Path, version: str) -> Path:
    """A root whose loader, a script, stands in for each program that it is to run."""
    for name in ("usr/bin", LIBRARIES, "lib64", "lib"):
        (root / name).mkdir(parents=True)
    for name in ("qemu-storage-daemon", "qemu-img"):
        (root / "usr" / "bin" / name).touch()
    loader = root / "lib64" / "ld-linux-x86-64.so.2"
    loader.write_text(f"#!/bin/sh\necho qemu-storage-daemon version {version}\n")
    loader.chmod(0o755)
    return root


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("qemu-storage-daemon version 11.1.3 (Debian 1:11.1.3+ds-1)\nCopyright (c) 2003-2026", (11, 1, 3)),
        ("qemu-storage-daemon version 10.0.2\n", (10, 0, 2)),
        ("qemu-storage-daemon version 11.0.50 (v11.0.0-1234-gabcdef)", (11, 0, 50)),
    ],
)
def test_versions(said: str, expected: tuple[int, ...]) -> None:
    assert parse_version(said) == expected


@pytest.mark.parametrize("said", ["", "segmentation fault", "version unknown"])
def test_no_version(said: str) -> None:
    with pytest.raises(ValueError, match="no version"):
        parse_version(said)


def test_iothreads() -> None:
    assert iothreads(0) == ([], "")
    assert iothreads(1) == (["--object", "iothread,id=thread0"], ",iothread=thread0")
    assert iothreads(2) == (
        ["--object", "iothread,id=thread0", "--object", "iothread,id=thread1"],
        ",iothread.0=thread0,iothread.1=thread1",
    )


def test_a_program_of_a_root_is_run_by_its_own_loader(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", "11.1.3")
    loader, option, libraries, binary = program(root, "qemu-img")
    assert (loader, option) == (str(root / "lib64" / "ld-linux-x86-64.so.2"), "--library-path")
    assert libraries == str(root / LIBRARIES)
    assert binary == str(root / "usr" / "bin" / "qemu-img")


def test_a_root_takes_part_with_one_thread_and_with_two(tmp_path: Path) -> None:
    one, two = peers(make_root(tmp_path / "root", "11.1.3"))
    assert (one.name, one.threads, one.version) == ("QEMU 11.1.3, 1 thread", 1, (11, 1, 3))
    assert (two.name, two.threads, two.version) == ("QEMU 11.1.3, 2 threads", 2, (11, 1, 3))
    assert one.command == two.command == program(tmp_path / "root", "qemu-storage-daemon")
    assert one.tool == program(tmp_path / "root", "qemu-img") and not two.tool


def test_an_older_one_takes_part_with_one_thread_alone(tmp_path: Path) -> None:
    (one,) = peers(make_root(tmp_path / "root", "10.0.13"))
    assert (one.name, one.threads) == ("QEMU 10.0.13, 1 thread", 1)


def test_a_directory_of_a_target_may_stand_in_an_option_of_qemu(tmp_path: Path) -> None:
    for kind in [*ALL, *peers(make_root(tmp_path / "root", "11.1.3"))]:
        assert not set(kind(tmp_path / "scratch").scratch.name) & set(", =")


def test_the_newest_is_that_of_the_highest_version(tmp_path: Path) -> None:
    old = peers(make_root(tmp_path / "old", "9.2.1"))
    new = peers(make_root(tmp_path / "new", "11.1.3"))
    expected = ("QEMU 11.1.3", ["QEMU 11.1.3, 1 thread", "QEMU 11.1.3, 2 threads"])
    assert newest([*ALL, *old, *new]) == newest([*new, *old]) == expected
    assert newest(ALL)[1] == []


def test_without_a_root_another_qemu_is_left_out_and_that_is_told() -> None:
    kinds, left_out = choose([], [])
    assert not [kind for kind in kinds if issubclass(kind, Peer)]
    assert "another QEMU: no --qemu-root" in left_out


def test_roots_stand_beside_the_peer(tmp_path: Path) -> None:
    kinds, left_out = choose([], [make_root(tmp_path / "root", "11.1.3")])
    names = [kind.name for kind in kinds]
    at = names.index("QEMU 11.1.3, 1 thread")
    assert names[at + 1] == "QEMU 11.1.3, 2 threads"
    assert names.index(RawFile.name) < at < names.index(QedFuse.name)
    assert not [text for text in left_out if "qemu-root" in text]


def test_targets_are_chosen_by_a_part_of_their_names(tmp_path: Path) -> None:
    kinds, _left_out = choose(["2 threads", "raw"], [make_root(tmp_path / "root", "11.1.3")])
    assert [kind.name for kind in kinds] == ["raw file", "QEMU 11.1.3, 2 threads"]


@pytest.mark.parametrize("missing", ["usr/bin/qemu-storage-daemon", "usr/bin/qemu-img", "lib64/ld-linux-x86-64.so.2"])
def test_a_root_that_lacks_something(tmp_path: Path, missing: str) -> None:
    root = make_root(tmp_path / "root", "11.1.3")
    (root / missing).unlink()
    with pytest.raises(click.ClickException, match=r"no such file|no dynamic loader"):
        choose([], [root])


def test_rows_are_for_those_that_can_be_measured(tmp_path: Path) -> None:
    one, two = peers(make_root(tmp_path / "root", "11.1.3"))

    def takers(title: str) -> set[type[Target]]:
        (row,) = [row for row in ROWS if title in row.title]
        return {kind for kind in [*ALL, one, two] if row.takes(kind)}

    everything: set[type[Target]] = {RawFile, StorageDaemon, NbdFuse, QedFuse, QedFusePython, one, two}
    assert takers("random read 4k direct, 1 reader") == everything
    assert takers("processor time of a random read") == everything - {RawFile}
    assert takers("processor time of a random write") == everything - {RawFile}
    assert takers("blkdiscard") == takers("fstrim") == everything
    assert takers("check a full") == {StorageDaemon, one, QedFuse}
    conversions = [row.title for row in ROWS if "convert " in row.title]
    assert len(conversions) == 8
    for title in conversions:
        assert {kind for row in ROWS if row.title == title for kind in everything if row.takes(kind)} == {
            StorageDaemon,
            one,
            QedFuse,
        }
    assert takers("longest wait") == {QedFuse}
