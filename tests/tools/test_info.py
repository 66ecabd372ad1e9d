"""`qedfuse info`: qemu-img's keys and values, nothing opened but the image, and what `--untrusted` refuses."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest

from qedfuse.cli.main import main
from qedfuse.errors import CorruptError, UnsupportedError
from qedfuse.qed.geometry import Geometry
from qedfuse.tools.info import ImageInfo, read_info
from qedfuse.tools.untrusted import DEFAULT_MAX_SIZE, read_untrusted
from tests.helpers.qemu.cli import environment, one_line, qedfuse, qemu_has_open, qemu_img, qemu_io

FEATURES_AT = 16
L1_AT = 40
SIZE_AT = 48


def patch(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<Q", value))


def ours(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["info", *args]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def assert_superset(found: dict[str, object], expected: dict[str, object]) -> None:
    assert {key: found.get(key) for key in expected} == expected


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """top.qed -> sub/middle.qed -> sub/../base (raw), and others beside. The working directory is theirs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "base").write_bytes(os.urandom(100_000) + bytes(1_000_001))
    qemu_img("create", "-q", "-f", "qed", "-b", "../base", "-F", "raw", "sub/middle.qed")
    qemu_img("create", "-q", "-f", "qed", "-b", "sub/middle.qed", "-F", "qed", "top.qed", "7M")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=8k", "-b", "base", "-F", "raw", "cow.qcow2", "2M")
    qemu_img("create", "-q", "-f", "qed", "-b", "cow.qcow2", "-F", "qcow2", "over-cow.qed")
    qemu_img("create", "-q", "-f", "qed", "-u", "-b", "nbd:localhost:1", "-F", "raw", "sub/nbd.qed", "1M")
    qemu_img("create", "-q", "-f", "qed", "-u", "-b", tmp_path / "base", "-F", "raw", "sub/absolute.qed", "1M")
    qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=4k,table_size=16", "small.qed", "123456789")
    qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=2M,table_size=2", "large.qed", "3T")
    qemu_io("top.qed", "write 1M 2M")
    qemu_img("create", "-q", "-f", "qed", "dirty.qed", "1M")
    patch(tmp_path / "dirty.qed", FEATURES_AT, 2)
    return tmp_path


NAMES = ["top.qed", "sub/middle.qed", "./sub/middle.qed", "over-cow.qed", "sub/nbd.qed", "sub/absolute.qed"]
NAMES += ["small.qed", "large.qed", "dirty.qed"]


@pytest.mark.parametrize("name", NAMES)
class TestAsQemu:
    def test_json(self, chain: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
        expected = json.loads(qemu_img("info", "-U", "-f", "qed", "--output=json", name))
        found = json.loads(ours(capsys, "-f", "qed", "--output=json", name))
        if name == "dirty.qed":
            assert found.pop("dirty-flag")  # QEMU never says so
            del expected["dirty-flag"]
        assert_superset(found, expected)
        assert set(found) - set(expected) <= {"format-specific", "children"}  # older QEMU has no children
        assert found["format-specific"]["type"] == "qed"

    def test_human(self, chain: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
        expected = qemu_img("info", "-U", "-f", "qed", name).split("Child node")[0].splitlines()  # newer QEMU's
        found = ours(capsys, name).splitlines()
        if name == "dirty.qed":
            found.remove("cleanly shut down: no")
        assert found[: len(expected)] == expected
        assert found[len(expected)] == "Format specific information:"

    def test_chain(self, chain: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
        if "nbd" in name:  # no server answers, and none is asked
            assert main(["info", "--backing-chain", name]) == 1
            return
        expected = json.loads(qemu_img("info", "-U", "-f", "qed", "--backing-chain", "--output=json", name))
        found = json.loads(ours(capsys, "-U", "--backing-chain", "--output=json", name))
        assert len(found) == len(expected)
        for layer, expected_layer in zip(found, expected, strict=True):
            assert_superset({**layer, "dirty-flag": False}, expected_layer)
        assert ours(capsys, "--backing-chain", name).count("image: ") == len(expected)


@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "lazy_refcounts=on,refcount_bits=64"])
def test_qcow2_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "1M")
    qemu_img("create", "-q", "-f", "qed", "-b", "a.qcow2", "-F", "qcow2", "b.qed")
    expected = json.loads(qemu_img("info", "--output=json", "a.qcow2"))
    found = json.loads(qedfuse("info", "--backing-chain", "--output=json", "b.qed").out)[1]
    assert_superset(found, expected)


def test_our_own_keys(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch(chain / "small.qed", 24, 1 << 40)
    patch(chain / "small.qed", 32, 5)
    found = json.loads(ours(capsys, "--output=json", "small.qed"))
    assert found["format-specific"]["data"] == {
        "table-size": 16,
        "header-size": 1,
        "l1-table-offset": 4096,
        "features": [],
        "compat-features": 1 << 40,
        "autoclear-features": 5,
        "max-virtual-size": Geometry(4096, 16).max_image_size,
    }
    found = json.loads(ours(capsys, "--output=json", "sub/middle.qed"))
    assert found["format-specific"]["data"]["features"] == ["backing-file", "backing-format-no-probe"]
    found = json.loads(ours(capsys, "--output=json", "dirty.qed"))
    assert found["format-specific"]["data"]["features"] == ["need-check"]


def test_table_size_1(tmp_path: Path) -> None:
    """Which QEMU cannot look at."""
    assert qedfuse("create", "-o", "table_size=1", "a.qed", "1M", cwd=tmp_path).code == 0
    result = qedfuse("info", "--output=json", "a.qed", cwd=tmp_path)
    assert json.loads(result.out)["format-specific"]["data"]["table-size"] == 1


def test_nothing_but_the_image_is_opened(chain: Path) -> None:
    """Not the backing file, not even to look whether it is there."""
    (chain / "base").unlink()
    (chain / "sub/middle.qed").unlink()
    os.mkfifo("sub/middle.qed")
    trace = chain / "trace"
    command = ["strace", "-f", "-e", "trace=file", "-o", str(trace), sys.executable, "-m", "qedfuse", "info", "top.qed"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = trace.read_text()
    assert '"top.qed"' in text
    assert "middle.qed" not in text
    assert "base" not in re.findall(r'"([^"/]*)"', text)


def test_chain_policy(chain: Path) -> None:
    for name in ("top.qed", "sub/middle.qed"):
        result = qedfuse("info", "--backing-chain", "--no-backing", name)
        one_line(result, 1, name, "--no-backing")
    one_line(qedfuse("info", "--backing-chain", "--backing-root", "sub", "top.qed"), 1, "base", "--backing-root")
    assert qedfuse("info", "--backing-chain", "--backing-root", ".", "top.qed").code == 0
    alone = qedfuse("info", "top.qed")
    for words in (["--no-backing"], ["--backing-root", "sub"]):  # also where only the image itself is to be shown
        one_line(qedfuse("info", *words, "top.qed"), 1, "backing file", words[0])
        one_line(qedfuse("info", "--untrusted", *words, "top.qed"), 2, "excludes")
    assert qedfuse("info", "--backing-root", ".", "top.qed") == alone


def test_no_name() -> None:
    one_line(qedfuse("info", ""), 2, "the name is empty")


def test_broken_chain(chain: Path) -> None:
    (chain / "base").unlink()
    one_line(qedfuse("info", "--backing-chain", "top.qed"), 1, "sub/middle.qed", "sub/../base", "no such file")
    one_line(qedfuse("info", "--backing-chain", "sub/nbd.qed"), 1, "sub/nbd.qed", "nbd:localhost:1")


def test_image_in_use(chain: Path) -> None:
    with qemu_has_open("top.qed"):
        one_line(qedfuse("info", "top.qed"), 1, "top.qed", "in use", "use -U to look at it anyway")
        one_line(qedfuse("info", "--untrusted", "top.qed"), 1, "top.qed", "in use", "-U")
        one_line(qedfuse("info", "--backing-chain", "top.qed"), 1, "top.qed", "in use", "-U")
        for option in ("-U", "--force-share"):
            expected = qemu_img("info", "-U", "-f", "qed", "--output=json", "top.qed")
            assert_superset(json.loads(qedfuse("info", option, "--output=json", "top.qed").out), json.loads(expected))
        assert qedfuse("info", "-U", "--backing-chain", "top.qed").code == 0
    assert qedfuse("info", "top.qed").code == 0


def test_names_are_harmless_on_a_terminal(tmp_path: Path) -> None:
    name = "evil\x1b[31m\nimage: fake\udcff"
    qemu_img("create", "-q", "-f", "qed", "-u", "-b", "x" * 32, "-F", "raw", tmp_path / "a.qed", "1M")
    raw = os.fsencode(name).ljust(32, b"x")
    with (tmp_path / "a.qed").open("r+b") as file:
        file.seek(64)
        file.write(raw)
    human = qedfuse("info", "a.qed", cwd=tmp_path)
    assert human.code == 0
    assert human.out.count("image: ") == 2
    assert "\x1b" not in human.out
    assert "\\x1b[31m\\nimage: fake\udcff" in human.out
    found = json.loads(qedfuse("info", "--output=json", "a.qed", cwd=tmp_path).out)
    assert found["backing-filename"] == raw.decode("utf-8", "replace")


class TestUntrusted:
    @pytest.fixture
    def image(self, tmp_path: Path) -> Path:
        path = tmp_path / "a.qed"
        qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=4k", path, "100M")
        qemu_io(path, "write -P 1 0 1M", "write -P 2 50M 64k")
        return path

    def test_good(self, image: Path) -> None:
        result = qedfuse("info", "--untrusted", "--output=json", image)
        assert (result.code, result.err) == (0, "")
        assert result == qedfuse("info", "--output=json", image)
        assert "virtual size: 100 MiB" in qedfuse("info", "--untrusted", image).out

    def test_leaks_are_harmless(self, image: Path) -> None:
        os.truncate(image, image.stat().st_size + 40960)
        assert qedfuse("info", "--untrusted", image).code == 0

    def test_refers_to_a_file(self, tmp_path: Path) -> None:
        for name in ("/etc/passwd", "../..", "json:{}", "nbd:x:1"):
            qemu_img("create", "-q", "-f", "qed", "-u", "-b", name, "-F", "raw", tmp_path / "b.qed", "1M")
            one_line(qedfuse("info", "--untrusted", "b.qed", cwd=tmp_path), 1, "b.qed", "another file", name)

    def test_absurd_size(self, image: Path) -> None:
        one_line(qedfuse("info", "--untrusted", "--max-size=99M", image), 1, "declares 104857600", "--max-size")
        assert qedfuse("info", "--untrusted", "--max-size=100M", image).code == 0

    def test_absurd_size_by_default(self, tmp_path: Path) -> None:
        path = tmp_path / "a.qed"
        qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=2M", path, "64T")
        assert qedfuse("info", "--untrusted", path).code == 0
        patch(path, SIZE_AT, (64 << 40) + 512)
        one_line(qedfuse("info", "--untrusted", path), 1, "declares")
        assert qedfuse("info", path).code == 0

    def test_not_closed_cleanly(self, image: Path) -> None:
        patch(image, FEATURES_AT, 2)
        one_line(qedfuse("info", "--untrusted", image), 1, str(image), "not closed cleanly")

    @pytest.mark.parametrize("entry", [4096, 4096 + 512, 1 << 40, (1 << 64) - 4096])
    def test_corrupt_tables(self, image: Path, entry: int) -> None:
        """An entry that points to the L1 table, between clusters, past the end, far out: in an L2 table, in L1."""
        with image.open("rb") as file:
            file.seek(4096)
            table = struct.unpack("<Q", file.read(8))[0]
        for offset, where in [(table, "guest offset 0x0"), (4096, "l1 entry 0")]:
            patch(image, offset, entry)
            one_line(qedfuse("info", "--untrusted", image), 1, str(image), "corrupt", where)

    def test_bounded_time(self, tmp_path: Path) -> None:
        """Eight million clusters in no order: a tenth of a second's work, cut short."""
        path = tmp_path / "a.qed"
        tables, entries = 64, 1 << 17
        qemu_img("create", "-q", "-f", "qed", "-o", "table_size=16", path, "512G")
        order = list(range(entries))
        random.Random(1).shuffle(order)
        with path.open("r+b") as file:
            file.seek(65536)
            file.write(struct.pack(f"<{tables}Q", *((17 + 16 * index) << 16 for index in range(tables))))
            for index in range(tables):
                base = 17 + 16 * tables + index * entries
                file.seek((17 + 16 * index) << 16)
                file.write(array("Q", [base + number << 16 for number in order]).tobytes())
            file.truncate((17 + 16 * tables + tables * entries) << 16)
        assert read_untrusted(str(path), time_limit=60).virtual_size == 512 << 30
        start = time.monotonic()
        with pytest.raises(UnsupportedError, match="too long"):
            read_untrusted(str(path), time_limit=0.01)
        assert time.monotonic() - start < 0.5

    def test_no_chain(self, image: Path) -> None:
        one_line(qedfuse("info", "--untrusted", "--backing-chain", image), 2, "--backing-chain")


def test_library(tmp_path: Path) -> None:
    """`read_info` raises what it documents, and leaves no descriptor open."""
    path = tmp_path / "a.qed"
    qemu_img("create", "-q", "-f", "qed", path, "1M")
    before = len(os.listdir("/proc/self/fd"))
    assert read_info(str(path)).full_backing_name is None
    os.truncate(path, 100_000)
    with pytest.raises(CorruptError, match="cut off"):
        read_info(str(path))
    with pytest.raises(CorruptError, match="cut off"):
        read_untrusted(str(path))
    assert len(os.listdir("/proc/self/fd")) == before
    assert DEFAULT_MAX_SIZE == Geometry().max_image_size
    assert ImageInfo("x", "raw", 512, 0, 512).to_json()["dirty-flag"] is False
