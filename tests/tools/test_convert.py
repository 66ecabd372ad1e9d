"""`qedfuse convert`: the guest's bytes stay the same, what is empty stays empty, and QEMU agrees."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qedfuse.cli.main import main
from tests.helpers.images.conversions import (
    CHAINS,
    GEOMETRIES,
    MIB,
    chain_names,
    flat,
    make_chain,
    qemu_finds_no_error,
    scatter,
    usage,
)
from tests.helpers.qemu.cli import environment, qedfuse, qemu_img, qemu_io


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def convert(capfd: pytest.CaptureFixture[str], *args: object) -> None:
    """It must succeed, and say nothing: this is no terminal."""
    assert main(["convert", *map(str, args)]) == 0
    assert capfd.readouterr() == ("", "")


def same(one: Path, other: Path) -> None:
    assert one.stat().st_size == other.stat().st_size
    assert one.read_bytes() == other.read_bytes()


def check(image: Path) -> None:
    assert main(["check", "-q", str(image)]) == 0
    qemu_finds_no_error(image)


@pytest.mark.parametrize("chain", CHAINS, ids=chain_names(CHAINS))
class TestAsQemu:
    def test_to_raw(self, tmp_path: Path, capfd: pytest.CaptureFixture[str], chain: list[tuple[str, int]]) -> None:
        source = make_chain(tmp_path, *chain)
        convert(capfd, "-f", source.suffix[1:], source, "out")
        same(tmp_path / "out", flat(source))
        assert usage(tmp_path / "out") <= usage(flat(source))

    @pytest.mark.parametrize(("cluster", "table"), GEOMETRIES)
    def test_to_qed(
        self,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
        chain: list[tuple[str, int]],
        cluster: int,
        table: int,
    ) -> None:
        source = make_chain(tmp_path, *chain, seed=table)
        options = f"cluster_size={cluster},table_size={table}"
        convert(capfd, "-f", source.suffix[1:], "-O", "qed", "-o", options, source, "out.qed")
        out, theirs = tmp_path / "out.qed", tmp_path / "theirs.qed"
        check(out)
        qemu_img("compare", "-f", source.suffix[1:], "-F", "qed", source, out)
        qemu_img("convert", "-f", source.suffix[1:], "-O", "qed", "-o", options, source, theirs)
        assert usage(out) <= usage(theirs)
        convert(capfd, out, "back")
        same(tmp_path / "back", flat(source))


class TestSparse:
    def test_nothing(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """Zeroes of every kind: holes, zero clusters, data that is zeroes."""
        image = tmp_path / "zero.qed"
        qemu_img("create", "-q", "-f", "qed", image, "20M")
        qemu_io(image, "write -P 0 1M 5M", "write -z 10M 2M")
        convert(capfd, image, "out")
        convert(capfd, "-O", "qed", image, "out.qed")
        assert ((tmp_path / "out").stat().st_size, usage(tmp_path / "out")) == (20 * MIB, 0)
        assert (tmp_path / "out.qed").stat().st_size == 5 * 65536
        check(tmp_path / "out.qed")

    def test_empty(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "empty").touch()
        convert(capfd, "-O", "qed", "-f", "raw", "empty", "out.qed")
        check(tmp_path / "out.qed")
        convert(capfd, "out.qed", "out")
        assert (tmp_path / "out").stat().st_size == 0

    @pytest.mark.parametrize("size", ["0", "512", "4k", "12k", "64k", "1M"])
    def test_how_many_zeroes_make_a_hole(self, tmp_path: Path, capfd: pytest.CaptureFixture[str], size: str) -> None:
        rnd = random.Random(size)
        with open("source", "wb") as file:
            for _ in range(200):
                length = rnd.choice([512, 4096, 8192, 65536])
                file.write(rnd.choice([bytes(length), rnd.randbytes(length)]))
            file.truncate(MIB * 10)
        convert(capfd, "-f", "raw", "-S", size, "source", "out")
        same(tmp_path / "out", tmp_path / "source")
        if size == "0":
            assert usage(tmp_path / "out") == 10 * MIB
        elif size == "4k":
            qemu_img("convert", "-f", "raw", "-O", "raw", "source", "theirs", cwd=tmp_path)
            assert usage(tmp_path / "out") <= usage(tmp_path / "theirs")

    def test_a_whole_image(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "source").write_bytes(bytes(3 * MIB))
        convert(capfd, "-f", "raw", "-O", "qed", "-S", "0", "source", "out.qed")
        assert usage(tmp_path / "out.qed") >= 3 * MIB
        check(tmp_path / "out.qed")
        convert(capfd, "out.qed", "out")
        same(tmp_path / "out", tmp_path / "source")

    def test_a_terabyte(self, tmp_path: Path) -> None:
        """With next to nothing in it: seconds, not minutes."""
        with open("source", "wb") as file:
            file.truncate(1 << 40)
            for at in (0, 123 << 30, (1 << 40) - 512):
                file.seek(at)
                file.write(b"x" * 512)
        assert qedfuse("convert", "-f", "raw", "-O", "qed", "source", "out.qed", cwd=tmp_path).code == 0
        assert usage(tmp_path / "out.qed") < 4 * MIB
        assert qedfuse("convert", "out.qed", "out", cwd=tmp_path).code == 0
        qemu_img("compare", "-f", "raw", "-F", "qed", "source", "out.qed", cwd=tmp_path)
        assert usage(tmp_path / "out") <= 3 * 4096


def test_clusters_are_in_order(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever their order was: what is read front to back lies front to back."""
    image = tmp_path / "source.qed"
    qemu_img("create", "-q", "-f", "qed", image, "40M")
    order = list(range(640))
    random.Random(1).shuffle(order)
    qemu_io(image, *(f"write -q -P {1 + at % 255} {at * 65536} 65536" for at in order))
    convert(capfd, "-O", "qed", image, "out.qed")
    assert main(["map", "out.qed"]) == 0
    assert len(capfd.readouterr().out.splitlines()) <= 3  # a header, and one extent, perhaps cut by a table
    qemu_img("compare", image, "out.qed", cwd=tmp_path)


def test_a_table_size_that_qemu_refuses(tmp_path: Path) -> None:
    """QEMU cannot open it; we can, and say so."""
    source = make_chain(tmp_path, ("raw", 9 * MIB))
    options = "cluster_size=4k,table_size=1"
    result = qedfuse("convert", "-f", "raw", "-O", "qed", "-o", options, source, "out.qed", cwd=tmp_path)
    assert (result.code, result.out) == (0, "")
    assert "warning: QEMU cannot open images with table_size=1" in result.err
    assert main(["check", "-q", "out.qed"]) == 0
    assert main(["convert", "out.qed", "out"]) == 0
    same(tmp_path / "out", source)


class TestTarget:
    def test_a_file_that_exists_is_overwritten_in_place(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        source = make_chain(tmp_path, ("raw", 3 * MIB))
        for options in ((), ("-O", "qed")):
            target, link = tmp_path / "target", tmp_path / "link"
            target.write_bytes(os.urandom(9 * MIB))
            target.chmod(0o640)
            link.unlink(missing_ok=True)
            link.symlink_to("target")
            inode = target.stat().st_ino
            convert(capfd, "-f", "raw", *options, source, link)
            assert link.is_symlink()
            assert (target.stat().st_ino, target.stat().st_mode & 0o777) == (inode, 0o640)
            qemu_img("compare", "-f", "raw", "-F", options[1] if options else "raw", source, target)

    def test_a_new_file_honours_the_umask(self, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(bytes(MIB))

        def strict() -> None:
            os.umask(0o027)

        assert qedfuse("convert", "-f", "raw", "source", "out", cwd=tmp_path, preexec=strict).code == 0
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640

    def test_n_fills_a_raw_file(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """Every byte of it, zeroes too; what is behind stays."""
        source = make_chain(tmp_path, ("raw", 4 * MIB), ("qed", 5 * MIB))
        junk = os.urandom(6 * MIB)
        (tmp_path / "out").write_bytes(junk)
        convert(capfd, "-n", source, "out")
        assert (tmp_path / "out").read_bytes() == flat(source).read_bytes() + junk[5 * MIB :]
        assert usage(tmp_path / "out") < 6 * MIB

    def test_n_fills_an_image(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """Over a backing file whose bytes must not shine through."""
        source = make_chain(tmp_path, ("qed", 5 * MIB))
        (tmp_path / "junk").write_bytes(os.urandom(6 * MIB))
        qemu_img("create", "-q", "-f", "qed", "-b", "junk", "-F", "raw", tmp_path / "out.qed")
        scatter(tmp_path / "out.qed", "qed", 6 * MIB, 9)
        old = flat(tmp_path / "out.qed").read_bytes()
        convert(capfd, "-n", "-O", "qed", source, "out.qed")
        assert main(["check", "-q", "out.qed"]) == 0
        assert flat(tmp_path / "out.qed").read_bytes() == flat(source).read_bytes() + old[5 * MIB :]


class TestProgress:
    @pytest.mark.parametrize("size", [0, 3 * MIB])
    @pytest.mark.parametrize("program", [("qemu-img",), (sys.executable, "-m", "qedfuse")], ids=["qemu", "ours"])
    def test_p_shows_the_line_of_qemu(self, tmp_path: Path, size: int, program: tuple[str, ...]) -> None:
        (tmp_path / "source").write_bytes(b"x" * size)
        command = [*program, "convert", "-p", "-f", "raw", "-O", "raw", "source", "out"]
        done = subprocess.run(command, env=environment(), capture_output=True, check=True)
        assert re.fullmatch(rb"(    \(\d+\.\d\d/100%\)\r)+\n", done.stdout)
        assert done.stdout.endswith(b"    (100.00/100%)\r\n")
        assert done.stderr == b""

    def test_q_is_quiet(self, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(b"x" * MIB)
        assert qedfuse("convert", "-p", "-q", "-f", "raw", "source", "out", cwd=tmp_path) == (0, "", "")


def test_options_that_only_say_how(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = make_chain(tmp_path, ("raw", MIB))
    hints = ["-W", "-C", "-m", "16", "-t", "none", "-T", "none"]
    convert(capfd, *hints, "-f", "raw", source, "out")
    convert(capfd, "-n", "--target-is-zero", "-f", "raw", source, "out")
    same(tmp_path / "out", source)
