"""The source archive holds all that is in the checkout."""

from __future__ import annotations

import subprocess

import pytest

from tests.helpers.qemu.cli import ROOT


def test_the_archive_holds_every_file_of_the_checkout() -> None:
    pytest.importorskip("setuptools", reason="setuptools is only there where something is built")
    from tests.sdist import source_files

    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == sorted(source_files(ROOT))
