"""No assert is true whatever happens, because an operator binds otherwise than it reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.helpers.qemu.cli import ROOT

#: What has one truth value: literals (a comparison and its message in brackets are a tuple), what is not called.
_ALWAYS = (ast.Constant, ast.Dict, ast.GeneratorExp, ast.JoinedStr, ast.Lambda, ast.List, ast.Set, ast.Tuple)


def suspects(test: ast.expr) -> Iterator[ast.expr]:
    """The parts of a condition that are no question. `x == a if b else c` is: (x == a) if b else c."""
    match test:
        case ast.BoolOp(values=values):
            for value in values:
                yield from suspects(value)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield from suspects(operand)
        case ast.IfExp():
            yield test
        case _ if isinstance(test, _ALWAYS) and not (isinstance(test, ast.Constant) and not test.value):
            yield test


def found_in(source: str) -> list[str]:
    asserts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    return [f"{node.lineno}: {ast.unparse(part)}" for node in asserts for part in suspects(node.test)]


def test_they_are_found() -> None:
    wrong = ["x == a if b else c", "x == 1 or 2", "(x == 1, 'message')", "not (x for x in y)", "x and f'{y}'"]
    assert all(len(found_in(f"assert {test}")) == 1 for test in wrong)
    right = ["x == (a if b else c)", "x == 1 or y == 2", "not [x for x in y]", "x in (1, 2)", "a or b and not c"]
    assert not any(found_in(f"assert {test}") for test in right)


def test_every_assert_asks_something() -> None:
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 200
    found = [f"{file.relative_to(ROOT)}:{line}" for file in files for line in found_in(file.read_text())]
    assert found == []
