"""`qedfuse create`: the same bytes as qemu-img's, and nothing overwritten that should not be."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from pathlib import Path

import pytest
import trio

from qedfuse.cli.main import main
from qedfuse.cli.params import parse_size, show_size
from qedfuse.errors import FormatError
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import Header
from qedfuse.qed.new_image import new_header, write_image
from qedfuse.sizes import round_up
from tests.helpers.doubles.crash import CrashStorage
from tests.helpers.doubles.image_ram import content
from tests.helpers.doubles.ram import RamFile
from tests.helpers.judges.history import Clock
from tests.helpers.qemu.cli import one_line, qedfuse, qemu_has_open, qemu_img, qemu_io

CLUSTER_SIZES = ["4k", "64k", "2M"]
#: But 2M with 16, which QEMU cannot create.
GEOMETRIES = [(size, table) for size in CLUSTER_SIZES for table in (1, 2, 4, 16)][:-1]


def header_of(path: Path) -> Header:
    with path.open("rb") as file:
        return Header.decode(file.read(64), str(path))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", ["0", "512", "1000", "3M", "123456789", "1G"])
def test_bytes_as_qemu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], geometry: tuple[str, int], size: str
) -> None:
    ours, theirs = tmp_path / "ours.qed", tmp_path / "theirs.qed"
    options = "cluster_size={},table_size={}".format(*geometry)
    expected = qemu_img("create", "-f", "qed", "-o", options, theirs, size)
    assert main(["create", "-o", options, str(ours), size]) == 0
    assert ours.read_bytes() == theirs.read_bytes()
    found = capsys.readouterr().out.replace(str(ours), str(theirs))
    rounded = round_up(parse_size(size), 512)
    assert found == re.sub(r" size=\d+ ", f" size={rounded} ", expected)


def test_defaults_as_qemu(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qed", tmp_path / "theirs.qed", "10M")
    assert qedfuse("create", "-q", "ours.qed", "10M", cwd=tmp_path) == (0, "", "")
    assert (tmp_path / "ours.qed").read_bytes() == (tmp_path / "theirs.qed").read_bytes()


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
@pytest.mark.parametrize("backing_format", ["raw", "qed", "qcow2"])
@pytest.mark.parametrize("size", [(), ("1M",), ("8M",)], ids=["same", "smaller", "larger"])
@pytest.mark.parametrize("probe", [False, True], ids=["stated", "probed"])
def test_backing_bytes_as_qemu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cluster_size: str,
    backing_format: str,
    size: tuple[str, ...],
    probe: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    qemu_img("create", "-q", "-f", backing_format, "base", "5M")
    options = ("-o", f"cluster_size={cluster_size}", "-b", "../base")
    expected = qemu_img("create", "-f", "qed", *options, "-F", backing_format, "sub/new.qed", *size)
    theirs = Path("sub/new.qed").read_bytes()
    stated = () if probe else ("-F", backing_format)
    assert main(["create", *options, *stated, "sub/new.qed", *size]) == 0
    assert Path("sub/new.qed").read_bytes() == theirs
    assert capsys.readouterr().out == expected
    assert header_of(tmp_path / "sub/new.qed").backing_is_raw == (backing_format == "raw")


def test_size_of_a_raw_file_is_rounded_up(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(1025))
    assert qedfuse("create", "-b", "base", "-F", "raw", "a.qed", cwd=tmp_path).code == 0
    assert header_of(tmp_path / "a.qed").image_size == 1536


def test_command_lines_as_qemu(tmp_path: Path) -> None:
    for words in (
        ["-f", "qed", "-o", "size=3M,cluster_size=4k,table_size=2", "base.qed"],
        ["-f", "qed", "-o", "backing_file=base.qed,backing_fmt=qed", "top.qed"],
    ):
        said = qemu_img("create", *words, cwd=tmp_path)
        expected = (tmp_path / words[-1]).read_bytes()
        assert qedfuse("create", *words, cwd=tmp_path) == (0, said, "")
        assert (tmp_path / words[-1]).read_bytes() == expected


def test_raw_with_a_magic_stays_raw(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qed", tmp_path / "base", "1M")
    assert qedfuse("create", "-b", "base", "-F", "raw", "a.qed", cwd=tmp_path).code == 0
    assert header_of(tmp_path / "a.qed").backing_is_raw
    assert header_of(tmp_path / "a.qed").image_size == (tmp_path / "base").stat().st_size


def test_absolute_backing_name(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(bytes(4096))
    assert qedfuse("create", "-b", base, "-F", "raw", tmp_path / "a.qed").code == 0
    assert f"backing file: {base}\n" in qemu_img("info", tmp_path / "a.qed")


def test_qemu_writes_to_it(tmp_path: Path) -> None:
    """A new image is one that QEMU can use, and check finds nothing in it."""
    image = tmp_path / "a.qed"
    assert qedfuse("create", "-o", "cluster_size=4k,table_size=2", image, "3M").code == 0
    qemu_io(image, "write -P 7 100k 1M", "read -P 7 100k 1M", "read -P 0 2M 1M")
    assert "No errors were found" in qemu_img("check", image)


SIZES = [
    "0",
    "1",
    "511",
    "513",
    "1k",
    "1K",
    "1.5k",
    "1.5M",
    "2b",
    "3B",
    "0.0001k",
    "1.999k",
    "0.00048828125k",
    "2t",
    "3g",
    "1P",
    "7.5E",
]
SIZES += ["0x1000", "0X2f", "9223372036854775807"]
NO_SIZES = [
    "1s",
    "1e3",
    "-1",
    "abc",
    "1kk",
    "",
    "1.5",
    "1.5b",
    "0x1.8k",
    "15 ",
    "9223372036854775808",
    "8E",
    "10E",
]


@pytest.mark.parametrize("text", SIZES + NO_SIZES)
def test_sizes_as_qemu(tmp_path: Path, text: str) -> None:
    done = subprocess.run(
        ["qemu-img", "create", "-f", "qed", tmp_path / "x.qed", "--", text], capture_output=True, text=True, check=False
    )
    found = re.search(r" size=(\d+) ", done.stdout)
    if found:
        assert parse_size(text) == int(found[1])
    else:
        with pytest.raises(ValueError, match="size"):
            parse_size(text)


def test_a_size_that_only_newer_qemu_knows() -> None:
    assert parse_size(".5M") == 512 << 10


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (512, "512 B"), (1000, "0.977 KiB"), (10 << 20, "10 MiB"), (1 << 40, "1 TiB"), (266240, "260 KiB")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert show_size(size) == text


class TestRefusals:
    def test_usage(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        image = str(tmp_path / "a.qed")
        for args, message in [
            ([], "missing argument 'FILE'"),
            ([image], "a size is needed"),
            ([image, "1q"], "'1q' is no size"),
            ([image, "1M", "2M"], "unexpected extra argument"),
            (["-F", "raw", image, "1M"], "it needs -b"),
            (["-b", "", image, "1M"], "name is empty"),
            (["-b", "x", "-F", "vmdk", image, "1M"], "'vmdk' is not one of"),
            (["-o", "cluster_size=5k", image, "1M"], "cluster size 5120 is not a power of two"),
            (["-o", "cluster_size=2k", image, "1M"], "cluster size 2048 is not a power of two between 4096"),
            (["-o", "cluster_size=128M", image, "1M"], "cluster size 134217728 is not"),
            (["-o", "table_size=3", image, "1M"], "table size 3 is not a power of two between 1 and 16"),
            (["-o", "table_size=32", image, "1M"], "table size 32 is not"),
            (["-o", "table_size=x", image, "1M"], "table_size: 'x' is no size"),
            (["-o", "preallocation=full", image, "1M"], "unknown option 'preallocation=full'"),
            (["-o", "size=1q", image], "'1q' is no size"),
            (["-o", "size=1M", image, "1M"], "given twice"),
            (["-o", "backing_fmt=raw", image, "1M"], "it needs -b"),
            (["-o", "backing_file=x,backing_fmt=vmdk", image, "1M"], "'vmdk' is not one of"),
            (["-f", "qcow2", image, "1M"], "'qcow2' is not 'qed'"),
            (["-o", "", image, "1M"], "unknown option ''"),
            (["-o", "cluster_size", image, "1M"], "unknown option 'cluster_size'"),
        ]:
            assert main(["create", *args]) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err.count("\n") == 1
            assert message in err
        assert not os.path.exists(image)

    @pytest.mark.parametrize(
        ("options", "largest"), [("cluster_size=4k,table_size=1", 1 << 30), ("cluster_size=64k,table_size=4", 1 << 46)]
    )
    def test_too_large(self, tmp_path: Path, options: str, largest: int) -> None:
        image = tmp_path / "a.qed"
        assert qedfuse("create", "-q", "-o", options, image, str(largest)).code == 0
        image.unlink()
        one_line(
            qedfuse("create", "-o", options, image, str(largest + 1)), 1, str(image), str(largest), "use larger ones"
        )
        assert not image.exists()

    def test_largest_of_all(self, tmp_path: Path) -> None:
        """A geometry that could map more than a file offset can say."""
        options = "cluster_size=64M,table_size=16"
        assert qedfuse("create", "-o", options, "a.qed", str((1 << 63) - 512), cwd=tmp_path).code == 0
        one_line(qedfuse("create", "-o", options, "b.qed", str((1 << 63) - 1), cwd=tmp_path), 1, "b.qed")

    def test_long_backing_name(self, tmp_path: Path) -> None:
        (tmp_path / "base").write_bytes(bytes(4096))
        for length, code in [(4032, 0), (4033, 1)]:
            name = "./" * ((length - 4) // 2) + "/" * (length % 2) + "base"
            assert len(name) == length
            result = qedfuse("create", "-q", "-o", "cluster_size=4k", "-b", name, f"{code}.qed", cwd=tmp_path)
            assert result.code == code
        one_line(result, 1, "1.qed", "4033 bytes", "4032")
        assert (tmp_path / "0.qed").read_bytes()[64:4096].decode() == "./" * 2014 + "base"
        assert not (tmp_path / "1.qed").exists()

    def test_qemu_has_it_open(self, tmp_path: Path) -> None:
        image = tmp_path / "a.qed"
        qemu_img("create", "-q", "-f", "qed", image, "1M")
        before = image.read_bytes()
        with qemu_has_open(image):
            one_line(qedfuse("create", image, "2M"), 1, str(image), "in use")
            assert image.read_bytes() == before
        assert qedfuse("create", image, "2M").code == 0

    def test_qemu_has_the_backing_file_open(self, tmp_path: Path) -> None:
        """As in QEMU, which only reads its size."""
        image = tmp_path / "a.qed"
        qemu_img("create", "-q", "-f", "qed", image, "1M")
        with qemu_has_open(image):
            assert qedfuse("create", "-b", "a.qed", "b.qed", cwd=tmp_path).code == 0

    @pytest.mark.parametrize("name", ["base.qed", "./base.qed", "soft.qed", "hard.qed", "middle.qed"])
    def test_the_backing_file_itself(self, tmp_path: Path, name: str) -> None:
        """Under whatever name, and also if it is further down."""
        base = tmp_path / "base.qed"
        qemu_img("create", "-q", "-f", "qed", base, "1M")
        qemu_img("create", "-q", "-f", "qed", "-b", "base.qed", "-F", "qed", "middle.qed", cwd=tmp_path)
        (tmp_path / "soft.qed").symlink_to("base.qed")
        (tmp_path / "hard.qed").hardlink_to(base)
        before = base.read_bytes()
        one_line(qedfuse("create", "-b", name, "base.qed", "5M", cwd=tmp_path), 1, "base.qed")
        assert base.read_bytes() == before

    def test_no_such_backing_file(self, tmp_path: Path) -> None:
        one_line(qedfuse("create", "-b", "no", "a.qed", "5M", cwd=tmp_path), 1, "a.qed", "no", "no such file")
        assert not (tmp_path / "a.qed").exists()

    def test_backing_file_of_another_format(self, tmp_path: Path) -> None:
        qemu_img("create", "-q", "-f", "vmdk", tmp_path / "base", "1M")
        one_line(qedfuse("create", "-b", "base", "a.qed", cwd=tmp_path), 1, "base", "vmdk")
        one_line(qedfuse("create", "-b", "base", "-F", "qed", "a.qed", cwd=tmp_path), 1, "base", "not a qed image")
        assert not (tmp_path / "a.qed").exists()

    def test_full_disk(self, tmp_path: Path) -> None:
        """What cannot be made whole is not left behind."""

        def small_files_only() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

        one_line(qedfuse("create", tmp_path / "a.qed", "1M", preexec=small_files_only), 1, "a.qed: file too large")
        assert not (tmp_path / "a.qed").exists()


@pytest.mark.parametrize("cluster_size", [4 << 10, 64 << 10, 1 << 20, 2 << 20, 4 << 20, 64 << 20])
@pytest.mark.parametrize("table_size", [1, 2, 4, 8, 16])
def test_warning_where_qemu_gives_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cluster_size: int, table_size: int
) -> None:
    image = tmp_path / "a.qed"
    options = f"cluster_size={cluster_size},table_size={table_size}"
    assert main(["create", "-q", "-o", options, str(image), "1M"]) == 0
    out, err = capsys.readouterr()
    qemu = subprocess.run(["qemu-img", "info", image], capture_output=True, text=True, check=False)
    assert out == ""
    assert err.count("\n") == (qemu.returncode != 0)
    assert ("warning: QEMU cannot open" in err) == (qemu.returncode != 0)
    assert header_of(image).table_size == table_size


def test_a_file_that_exists_is_overwritten_in_place(tmp_path: Path) -> None:
    """As qemu-img does: the inode, its mode and the links to it stay."""
    image, link = tmp_path / "a.qed", tmp_path / "link.qed"
    image.write_bytes(b"x" * 10_000_000)
    image.chmod(0o640)
    link.symlink_to("a.qed")
    inode = image.stat().st_ino
    assert qedfuse("create", link, "1M").code == 0
    qemu_img("create", "-q", "-f", "qed", tmp_path / "theirs.qed", "1M")
    assert image.read_bytes() == (tmp_path / "theirs.qed").read_bytes()
    assert link.is_symlink()
    assert (image.stat().st_ino, image.stat().st_mode & 0o777) == (inode, 0o640)


def test_new_file_honours_umask_and_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link.qed").symlink_to("new.qed")
    assert qedfuse("create", "link.qed", "1M", cwd=tmp_path, preexec=lambda: void(os.umask(0o027))).code == 0
    assert (tmp_path / "new.qed").stat().st_mode & 0o777 == 0o640


def void(_value: object) -> None:
    pass


def test_table_takes_no_space(tmp_path: Path) -> None:
    image = tmp_path / "a.qed"
    assert qedfuse("create", "-o", "cluster_size=64M,table_size=16", image, "1T").code == 0
    assert image.stat().st_size == 17 * (64 << 20)
    assert image.stat().st_blocks * 512 <= 1 << 20


def test_crash_leaves_the_old_image_or_the_new_one_or_none(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qed", "-u", "-b", "old-name", "-F", "raw", tmp_path / "old.qed", "3M")
    old = (tmp_path / "old.qed").read_bytes()
    name = b"new-name-that-is-longer"
    header = new_header("log", 9 << 20, Geometry(4096, 2), name)
    for before in (b"", old):
        log = CrashStorage("log", RamFile.of(before), Clock())
        trio.run(write_image, log, header, name)
        new = content(log.file)
        states = {content(state) for point in log.crash_points() for state in point.every_state()}
        assert before in states and new in states
        for state in states:
            if state not in (before, new):
                with pytest.raises(FormatError, match="not a qed image"):
                    Header.decode(state[:64], "crashed")
    Header.decode(new[:64], "new").validate_file_size(len(new), "new")
    assert new[64:87] == name
