"""Names are those that there are: of what is imported, also by programs that stand in strings, and in comments."""

from __future__ import annotations

import ast
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.helpers.qemu.cli import ROOT

PACKAGES = ("qedfuse", "tests")

#: Everything that may show how something is imported.
TEXTS = sorted(
    path
    for place in (*PACKAGES, "examples", ".github", ".ci")
    for path in [*(ROOT / place).rglob("*"), *ROOT.glob("*.md")]
    if path.suffix in (".py", ".pyi", ".sh", ".md", ".yml") or place == ".ci"
)
SOURCES = [path for path in TEXTS if path.suffix in (".py", ".pyi") and path.is_relative_to(ROOT)]
C_SOURCES = sorted((ROOT / "qedfuse" / "native").rglob("*.[ch]"))

_FROM = re.compile(r"\bfrom\s+((?:qedfuse|tests)(?:\.\w+)*)\s+import\s+(\([^)]*\)|[\w, ]+)")
_IMPORT = re.compile(r"\bimport\s+((?:qedfuse|tests)(?:\.\w+)+)")


@dataclass
class Module:
    """What a module defines or imports, and its classes: their attributes, and the names of their bases."""

    names: set[str] = field(default_factory=set)
    classes: dict[str, tuple[set[str], list[str]]] = field(default_factory=dict)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def bound_by(nodes: list[ast.stmt]) -> Iterator[str]:
    """The names that statements bind, inside of `if`, `try` and `with`, too."""
    for node in nodes:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name.partition(".")[0] for alias in names)
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign() | ast.For() | ast.With():
                yield from (
                    inner.id
                    for inner in ast.walk(node)
                    if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
                )
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for block in ("body", "orelse", "finalbody"):
                yield from bound_by(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                yield from bound_by(handler.body)


def attributes_of(node: ast.ClassDef) -> set[str]:
    """What a class or its instances have, as far as it is set in the class."""
    own = {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == "self"
    }
    return own | set(bound_by(node.body))


@cache
def modules() -> dict[str, Module]:
    found: dict[str, Module] = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        classes = {
            node.name: (attributes_of(node), [ast.unparse(base).rpartition(".")[2] for base in node.bases])
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        }
        found[module_of(path)] = Module(set(bound_by(tree.body)) | set(classes), classes)
    for name in list(found):
        while (name := name.rpartition(".")[0]) and name not in found:
            found[name] = Module()  # a package without a file
    for name in found:
        package, _, last = name.rpartition(".")
        if package:
            found[package].names.add(last)
    return found


# -- imports ----------------------------------------------------------------------------------------------------------


def imports_in(text: str) -> Iterator[tuple[str, str]]:
    """Modules of ours that a text imports, wherever in it, and the names from them ("": the module itself)."""
    for module, names in _FROM.findall(text):
        for name in re.sub(r"#.*|[()]", "", names).split(","):
            words = name.split()
            if words and (len(words) == 1 or words[1] == "as"):
                yield module, words[0]
    for module in _IMPORT.findall(text):
        yield module, ""


def programs_in(tree: ast.AST) -> Iterator[ast.Module]:
    """The strings that are programs: they import something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            try:
                yield ast.parse(textwrap.dedent(node.value))
            except SyntaxError:
                continue


def used_of(program: ast.Module) -> Iterator[tuple[str, str]]:
    """Modules of ours that a program imports, and the attributes that it uses of them, or sets."""
    local: dict[str, str] = {}
    for node in ast.walk(program):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                local[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(program):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = local.get(node.value.id)
            if module in modules():
                yield module, node.attr


def unresolved(found: Iterator[tuple[str, str]]) -> list[str]:
    known = modules()
    return [
        f"{module}.{name}".rstrip(".")
        for module, name in found
        if module not in known or (name and name not in known[module].names)
    ]


def test_the_texts_are_found() -> None:
    names = {named(path) for path in TEXTS}
    assert {"README.md", "examples/setup.sh", ".ci/run", "tests/conftest.py", "qedfuse/ARCHITECTURE.md"} <= names
    assert {"qedfuse/native/_fastpath.pyi", ".github/workflows/tests.yml"} <= names
    assert sum(len(list(programs_in(ast.parse(path.read_text())))) for path in SOURCES) > 20


def test_a_wrong_import_is_found() -> None:
    texts = [
        "async with x: ...\n    from qedfuse.check import release",
        '"import sys; from qedfuse.check import repair, release; release.BATCH = 5"',
        "from qedfuse.nowhere import x",
        "from tests.helpers.qemu.cli import (\n    ROOT,\n    ROOTS as R,  # one\n)",
        "python -c 'import qedfuse.no_module'",
    ]
    missing = ["qedfuse.check.release"] * 2
    missing += ["qedfuse.nowhere.x", "tests.helpers.qemu.cli.ROOTS", "qedfuse.no_module"]
    assert [name for text in texts for name in unresolved(imports_in(text))] == missing
    [program] = programs_in(ast.parse("'from qedfuse.check import repair; repair.NONE = repair.Report'"))
    assert unresolved(used_of(program)) == ["qedfuse.check.repair.NONE"]


def test_what_is_imported_is_there() -> None:
    """In strings, scripts and documents as well, which mypy does not read."""
    own = Path(__file__)
    missing = [
        f"{named(path)}: {name}" for path in TEXTS if path != own for name in unresolved(imports_in(path.read_text()))
    ]
    assert missing == []


def test_what_programs_in_strings_use_is_there() -> None:
    own = Path(__file__)
    missing = [
        f"{named(path)}: {name}"
        for path in SOURCES
        if path != own
        for program in programs_in(ast.parse(path.read_text()))
        for name in unresolved(used_of(program))
    ]
    assert missing == []


# -- comments and docstrings ------------------------------------------------------------------------------------------

_DOTTED = re.compile(r"(?<![\w./-])([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)")
_QUOTED = re.compile(r"`([A-Za-z]\w+)`")
_SEE = re.compile(r"\bsee `(\w+)`", re.IGNORECASE)
_FILE = re.compile(r"\.(?:py|c|h|sh|md|toml|yml|rst|qed|raw)$")

#: Names that are others': QEMU's.
FOREIGN = {"ImageInfoSpecificQCow2"}
#: What stands for any name.
PLACEHOLDERS = ("NAME", "N")


@dataclass
class Prose:
    """A file's comments and docstrings, and the words of its code, strings included."""

    texts: list[str]
    words: set[str]


def read_python(source: str) -> Prose:
    docstrings: dict[tuple[int, int], str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node):
                docstrings[first.value.lineno, first.value.col_offset] = str(first.value.value)
    texts, words = list(docstrings.values()), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            texts.append(token.string)
        elif token.start not in docstrings:
            words |= set(re.findall(r"\w+", token.string))
    return Prose(texts, words)


def read_c(source: str) -> Prose:
    comment = re.compile(r"/\*.*?\*/", re.DOTALL)
    return Prose(comment.findall(source), set(re.findall(r"\w+", comment.sub("", source))))


@cache
def prose() -> dict[Path, Prose]:
    files = {path: read_python(path.read_text()) for path in SOURCES}
    return files | {path: read_c(path.read_text()) for path in C_SOURCES}


@cache
def classes() -> dict[str, tuple[set[str], list[str]]]:
    """All classes by their names; of several of one name, what any of them has."""
    found: dict[str, tuple[set[str], list[str]]] = {}
    for module in modules().values():
        for name, (attributes, bases) in module.classes.items():
            known, more = found.get(name, (set(), []))
            found[name] = known | attributes, more + bases
    return found


def has(name: str, attribute: str) -> bool:
    """Whether a class, or one that it is derived from, has an attribute."""
    attributes, bases = classes()[name]
    return attribute in attributes or any(base != name and base in classes() and has(base, attribute) for base in bases)


def is_there(dotted: str, path: Path) -> bool:
    """`Class.attribute`, `module.name` and so on. What begins with none of ours may be anything but a class.

    A variable often has the name of its class's module: what some class there, or in the same file, has will do.
    """
    first, second, *rest = dotted.split(".")
    if second in PLACEHOLDERS:
        return True
    if first in classes():
        return has(first, second)
    known = modules()
    places = [name for name in known if name.rpartition(".")[2] == first]
    if not places:
        return not second[0].isupper()
    if any(second in known[place].names for place in places):
        return not rest or is_there(".".join([second, *rest]), path)
    nearby = [known[place] for place in [*places, module_of(path)] if place in known]
    return any(has(name, second) for module in nearby for name in module.classes)


def test_names_with_dots_are_there() -> None:
    missing = [
        f"{named(path)}: {dotted}"
        for path, content in prose().items()
        for text in content.texts
        for dotted in _DOTTED.findall(text)
        if not _FILE.search(dotted) and not is_there(dotted, path)
    ]
    assert missing == []


def test_quoted_names_are_there() -> None:
    """Somewhere in the code; in the same file if it is to be looked up there."""
    everywhere = {word for content in prose().values() for word in content.words}
    everywhere |= {part for name in modules() for part in name.split(".")} | FOREIGN
    missing = [
        f"{named(path)}: {name}"
        for path, content in prose().items()
        for text in content.texts
        for name in [
            *(name for name in _QUOTED.findall(text) if name not in everywhere),
            *(name for name in _SEE.findall(text) if name not in content.words),
        ]
    ]
    assert missing == []
