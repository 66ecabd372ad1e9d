"""What no formatter looks at: lines of C, of shell scripts and of workflows keep to the width of the page."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.helpers.qemu.cli import ROOT

WIDTH: int = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["line-length"]

C_FILES = sorted((ROOT / "qedfuse" / "native").rglob("*.[ch]"))
SCRIPTS = [
    *sorted(path for place in ("examples", "tests") for path in (ROOT / place).rglob("*.sh")),
    *sorted((ROOT / ".github").rglob("*.yml")),
    *sorted((ROOT / ".ci").iterdir()),
]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_files_are_found() -> None:
    assert len(C_FILES) > 30
    assert {"tests.yml", "setup.sh", "sanitize.sh", "run"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("path", [*C_FILES, *SCRIPTS], ids=named)
def test_no_line_is_too_long(path: Path) -> None:
    wide = [number for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > WIDTH]
    assert not wide


@pytest.mark.parametrize("path", [path for path in C_FILES if path.suffix == ".h"], ids=named)
def test_the_guard_of_a_header_is_its_name(path: Path) -> None:
    guard = f"QEDFUSE_{path.stem.upper()}_H"
    assert f"#ifndef {guard}\n#define {guard}\n" in path.read_text()
