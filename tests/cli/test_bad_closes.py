"""Commands on a host that has failed and fails again when files are closed: they say what they would say otherwise."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qedfuse.cli.main import main
from qedfuse.host.file_storage import FileStorage
from tests.helpers.images.chains import make_qed, make_raw


@pytest.mark.parametrize(
    "command",
    [
        ("check", "raw"),
        ("check", "-r", "all", "raw"),
        ("info", "raw"),
        ("map", "corrupt.qed"),
        ("convert", "corrupt.qed", "new"),
        ("convert", "-O", "qed", "-B", "corrupt.qed", "-F", "qed", "fine.qed", "new"),
    ],
    ids=" ".join,
)
def test_what_went_wrong_is_said_whatever_closing_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_raw(Path("raw"))
    make_qed(Path("fine.qed"))
    with make_qed(Path("corrupt.qed")).open("r+b") as file:
        os.pwrite(file.fileno(), b"\1" * 8, 8192)
    close = FileStorage.close

    async def fail(file: FileStorage) -> None:
        await close(file)
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), file.path)

    expected = main([*command]), capfd.readouterr().err
    assert expected[0] != 0
    with monkeypatch.context() as patch:
        patch.setattr(FileStorage, "close", fail)
        assert (main([*command]), capfd.readouterr().err) == expected
