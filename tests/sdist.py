"""The source archive: all that its own tests and examples need, which setuptools would leave out.

pyproject.toml names the class. setuptools loads it by this file's path; nothing else is installed where it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from setuptools.command.sdist import sdist

#: Directories of a checkout that go into it, and what is beside them.
PLACES = ["qedfuse", "tests", "examples", ".ci", ".github"]
FILES = [
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    ".editorconfig",
    ".gitignore",
    ".git-blame-ignore-revs",
]

#: What is made from the others, or by running them.
_MADE = {"__pycache__", "results"}
_MADE_SUFFIXES = {".pyc", ".so", ".o"}


def source_files(root: Path) -> Iterator[str]:
    """The files that belong to the sources in `root`, as paths from there."""
    yield from FILES
    for place in PLACES:
        for path in sorted((root / place).rglob("*")):
            if path.is_file() and path.suffix not in _MADE_SUFFIXES and not _MADE.intersection(path.parts):
                yield str(path.relative_to(root))


class SourceDistribution(sdist):
    def make_distribution(self) -> None:
        self.filelist.files = sorted({*self.filelist.files, *source_files(Path())})
        super().make_distribution()
