"""Nothing lies about: no module that nothing imports, no helper that nothing uses, no file named that is not there."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

from tests.helpers.qemu.cli import ROOT

PACKAGE = ROOT / "qedfuse"
TESTS = ROOT / "tests"
HELPERS = TESTS / "helpers"

#: Where a test may stand beside the rooms of the package.
PLACES = {"house", "bench", "fuzz"}
SYSTEM = {"crash", "kill", "interop", "hostile", "limits", "guest", "mount"}

#: Modules that wait for the first one that imports them: there is no job yet.
AWAITED = {"qedfuse.jobs.job"}
#: Modules that are run, not imported.
PROGRAMS = {"qedfuse.__main__", "tests.bench.__main__", "tests.fuzz.fuzz_open", "tests.fuzz.fuzz_qcow2", "tests.sdist"}

#: A file's name in backquotes, perhaps with directories, arguments before it, or a test's name behind it.
_NAMED = re.compile(r"`[^`\n]*?([\w./*-]+\.(?:py|c|h|sh|md|toml|yml))\b[^`\n]*`")
#: Names that a text gives as an example, or that are not in this tree.
NOT_OURS = {"setup.py"}

FILES = sorted(path for place in (PACKAGE, TESTS) for path in place.rglob("*.py"))
SOURCES = {path: path.read_text() for path in FILES}
C_FILES = sorted(PACKAGE.rglob("*.[ch]"))
TEST_FILES = [path for path in FILES if path.name.startswith("test_")]


def test_the_files_are_found() -> None:
    """Or nothing below could be amiss."""
    assert len(TEST_FILES) > 100 and len(FILES) - len(TEST_FILES) > 150 and len(C_FILES) > 30


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILE_OF = {module_of(path): path for path in FILES}


def imports_of(source: str) -> set[str]:
    """All modules that a source imports, anywhere in it, or names in a string (some are loaded by name)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"\b(?:qedfuse|tests)(?:\.\w+)+", node.value))
    return found


def test_every_module_of_the_package_is_imported_by_it() -> None:
    """What only tests import is no part of the program."""
    inside = [path for path in FILES if path.is_relative_to(PACKAGE)]
    imported = {name for path in inside for name in imports_of(SOURCES[path])}
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values()
    imported |= {script.partition(":")[0] for script in scripts}
    modules = {module_of(path) for path in inside if path.name != "__init__.py"}
    lonely = modules - imported - PROGRAMS - AWAITED
    assert not lonely


def test_every_helper_is_imported() -> None:
    imported = {name for source in SOURCES.values() for name in imports_of(source)}
    helpers = {module_of(path) for path in FILES if path.is_relative_to(TESTS) and path not in TEST_FILES}
    lonely = {
        name for name in helpers - imported - PROGRAMS if FILE_OF[name].name not in ("conftest.py", "__init__.py")
    }
    assert not lonely


def definitions(source: str) -> set[str]:
    """The functions, classes, methods and constants of a module, without those that the language calls."""
    tree = ast.parse(source)
    found: set[str] = set()
    for node in [
        *tree.body,
        *(inner for outer in tree.body if isinstance(outer, ast.ClassDef) for inner in outer.body),
    ]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not _is_registered(node):
                found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in found if not (name.startswith("__") and name.endswith("__"))}


def _is_registered(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether a decorator keeps what it decorates, so that nothing need name it (a scenario, a corpus' entry)."""
    names = {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}
    return bool(
        names - {"property", "classmethod", "staticmethod", "contextmanager", "asynccontextmanager", "dataclass"}
    )


def test_every_function_of_the_helpers_is_used() -> None:
    """By its name, anywhere but where it is defined. What overrides a method of the package's is used by that."""
    words = Counter(word for source in SOURCES.values() for word in re.findall(r"\w+", source))
    unused = {
        f"{module_of(path)}.{name}"
        for path in FILES
        if path.is_relative_to(HELPERS)
        for name in definitions(SOURCES[path])
        if words[name] < 2 and f'f"{name.partition("_")[0]}_{{' not in SOURCES[path]  # do_read as f"do_{name}"
    }
    assert not unused


def test_a_chain_is_walked_in_one_place() -> None:
    """`layers_of`: no other loop goes from a layer to the one below."""
    loops = [
        f"{path.relative_to(ROOT)}:{loop.lineno}"
        for path, source in SOURCES.items()
        if path != PACKAGE / "layers" / "layer.py"
        for loop in ast.walk(ast.parse(source))
        if isinstance(loop, ast.While)
        for node in ast.walk(loop)
        if isinstance(node, ast.Attribute)
        and node.attr == "backing"
        and isinstance(node.value, ast.Name | ast.Subscript)
    ]
    assert not loops


def test_files_that_are_named_exist() -> None:
    """By its whole path, or one from a room on, or its name alone."""
    places = (PACKAGE, TESTS, ROOT / "examples", ROOT / ".github", ROOT / ".ci")
    names = [str(file.relative_to(ROOT)) for place in places for file in place.rglob("*")]
    known = "\n".join([*names, *(file.name for file in ROOT.iterdir())])
    texts = [
        path for place in (".", ".github", "qedfuse", "examples", "tests") for path in (ROOT / place).glob("*.[ms][dh]")
    ]
    missing = []
    for path in [*texts, *FILES, *C_FILES]:
        for name in _NAMED.findall(path.read_text()):
            name = name.removeprefix("./")
            pattern = "^(.*/)?" + re.escape(name).replace(r"\*", "[^/]*") + "$"
            if name not in NOT_OURS and not re.search(pattern, known, re.MULTILINE):
                missing.append(f"{path.relative_to(ROOT)} names {name}")
    assert not missing


def test_every_test_has_its_room() -> None:
    """A room of the package, deeper if its test is of a part of it, or a place of the system's tests."""
    astray = []
    for path in TEST_FILES:
        room, *deeper = path.parent.relative_to(TESTS).parts
        if room == "system":
            found = len(deeper) == 1 and deeper[0] in SYSTEM
        else:
            found = (room in PLACES and not deeper) or PACKAGE.joinpath(room, *deeper).is_dir()
        if not found:
            astray.append(str(path.relative_to(TESTS)))
    assert not astray


def test_the_longest() -> None:
    """Judges nothing: a length is no fault by itself, but a person should look."""
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in [*FILES, *C_FILES]}
    functions = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for lengths in (lines, functions):
        for name, length in Counter(lengths).most_common(10):
            print(f"figures: {length:4} lines: {name}")
