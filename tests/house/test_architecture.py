"""ARCHITECTURE.md names files and functions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.helpers.qemu.cli import ROOT

TEXT = (ROOT / "qedfuse" / "ARCHITECTURE.md").read_text()

_FILE = re.compile(r"(?<![\w/])((?:\w+/)*\w+\.(?:py|c|h|md))(?::(\w+))?")


def named() -> list[tuple[str, str]]:
    """Every file that the text names, with the function behind the colon, if any."""
    return sorted({(file, function) for file, function in _FILE.findall(TEXT) if file != "ARCHITECTURE.md"})


def path_of(file: str) -> Path | None:
    """A file is named from the package's or the project's top; in the same step's room it may be its bare name."""
    for root in (ROOT / "qedfuse", ROOT):
        if (root / file).exists():
            return root / file
    found = list((ROOT / "qedfuse").rglob(file)) if "/" not in file else []
    return found[0] if len(found) == 1 else None


def defines(path: Path, function: str) -> bool:
    if path.suffix == ".py":
        nodes = ast.walk(ast.parse(path.read_text()))
        return any(isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == function for n in nodes)
    return re.search(rf"^\w[^;\n]*\b{function}\([^;]*\)\n\{{", path.read_text(), re.MULTILINE) is not None


def test_it_names_what_there_is() -> None:
    assert len(named()) > 40
    assert sum(bool(function) for _file, function in named()) > 25


@pytest.mark.parametrize(("file", "function"), named())
def test_what_it_names_exists(file: str, function: str) -> None:
    path = path_of(file)
    assert path is not None, f"{file} is not there, or not the only one of its name"
    assert not function or defines(path, function), f"{path} has no function {function}"


def names_of_rooms() -> list[tuple[str, str]]:
    """The rooms, each with a name that is told of it in the last column."""
    drawing = TEXT.partition("## Rooms")[2].partition("\n## ")[0]
    rows = re.findall(r"^    (\w+)/ .*?\S {2,}(\w+(?:, \w+)*)$", drawing, re.MULTILINE)
    return [(room, name) for room, names in rows for name in names.split(", ")]


def test_rooms_have_what_they_are_known_for() -> None:
    found = names_of_rooms()
    assert {("host", "FileId"), ("jobs", "JobControl"), ("fuse", "Tree")} <= set(found)
    missing = []
    for room, name in found:
        defined = re.compile(rf"^(?:class|def|async def) {name}\b", re.MULTILINE)
        if not any(defined.search(path.read_text()) for path in (ROOT / "qedfuse" / room).rglob("*.py")):
            missing.append(f"{room}/ has no {name}")
    assert missing == []


def test_it_is_two_pages_at_most() -> None:
    assert len(TEXT.splitlines()) <= 120
