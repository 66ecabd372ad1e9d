"""The one way to a header in a file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qedfuse.errors import CorruptError, FormatError
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.waiting import run_blocking
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import Header, NotQedError
from qedfuse.qed.header_io import read_backing_name, read_fields, read_header
from qedfuse.qed.new_image import new_header

PACKAGE = Path(__file__).parents[2] / "qedfuse"
HEADER = new_header("x", 1 << 20, Geometry(4096, 1), b"base.raw")


def write(path: Path, header: Header = HEADER, size: int = 8192) -> FileStorage:
    path.write_bytes(header.encode() + b"base.raw")
    os.truncate(path, size)
    return FileStorage.open(path, False)


def test_a_header_and_a_name_are_read_without_an_event_loop(tmp_path: Path) -> None:
    storage = write(tmp_path / "a.qed")
    assert run_blocking(read_header(storage)) == HEADER
    assert run_blocking(read_backing_name(storage, HEADER)) == "base.raw"
    run_blocking(storage.close())


def test_a_file_that_is_cut_off_has_fields_and_no_valid_header(tmp_path: Path) -> None:
    storage = write(tmp_path / "a.qed", size=8191 - 512)
    assert run_blocking(read_fields(storage)) == HEADER
    with pytest.raises(CorruptError, match="cut off"):
        run_blocking(read_header(storage))
    run_blocking(storage.close())


@pytest.mark.parametrize("size", [0, 3, 4, 63])
def test_a_short_file_is_told_from_another_kind_of_file(tmp_path: Path, size: int) -> None:
    storage = write(tmp_path / "a.qed", size=size)
    with pytest.raises(FormatError) as caught:
        run_blocking(read_fields(storage))
    assert isinstance(caught.value, NotQedError) == (size < 4)
    run_blocking(storage.close())


def test_nothing_else_reads_a_header() -> None:
    users = {file.name for file in PACKAGE.rglob("*.py") if re.search(r"(?<!Qcow2)Header\.decode\(", file.read_text())}
    of_journals = {"qcow2_to_qed.py", "qed_to_raw.py"}  # the sectors that stand in them
    assert users == {"header_io.py"} | of_journals
