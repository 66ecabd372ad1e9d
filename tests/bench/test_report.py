"""What the benchmark concludes from its figures."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.bench import report
from tests.bench.measures import Context
from tests.bench.targets import Target
from tests.bench.workloads import Row

NEW = ("QEMU 11.1.3", ["one", "two"])
HEAD = f"{report.OURS} to QEMU 11.1.3"


def unmeasured(target: Target, context: Context) -> float:
    raise NotImplementedError


SPEED = Row("speed", "IOPS", unmeasured)
SECONDS = Row("seconds", "s", unmeasured, higher_is_better=False)


@pytest.mark.parametrize(
    ("row", "one", "two", "expected"),
    [
        (SPEED, [10], [20], 2),
        (SPEED, [20], [10], 2),
        (SPEED, [10], [], 4),
        (SPEED, [], [80], 0.5),
        (SPEED, [1, 20, 1000], [10, 10, 10], 2),  # medians
        (SECONDS, [10], [20], 0.25),
        (SECONDS, [80], [160], 2),
        (SPEED, [], [], None),
    ],
)
def test_the_ratio_to_the_better_of_two(row: Row, one: list[float], two: list[float], expected: float | None) -> None:
    assert report.best_ratio(row, {"one": one, "two": two, report.OURS: [40]}, ["one", "two"]) == expected


def test_no_ratio_without_a_figure_of_ours() -> None:
    assert report.best_ratio(SPEED, {"one": [1.0]}, ["one", "two"]) is None


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_each_row_tells_how_we_compare_with_the_newest_qemu() -> None:
    results = {"speed": {report.OURS: [30.0], "one": [10.0], "two": [20.0]}, "seconds": {report.OURS: [3.0]}}
    head, rule, *rows = cells(report.markdown([SPEED, SECONDS], [report.OURS, "one", "two"], results, NEW))
    assert len(rule) == len(head) and all(len(row) == len(head) for row in rows)
    assert [row[head.index(HEAD)] for row in rows] == ["1.50x", "-"]
    assert [row[head.index("two")] for row in rows] == ["20 ±0%", "-"]


def test_without_another_qemu_the_table_has_no_such_column() -> None:
    head, rule, row = cells(report.markdown([SPEED], [report.OURS], {"speed": {report.OURS: [30.0]}}, ("QEMU ", [])))
    assert head == ["workload", "unit", report.OURS, "bar"]
    assert len(rule) == len(row) == len(head)


def test_what_is_missing_is_told() -> None:
    failures = {
        ("two", "ended with exit code -6"): Counter(speed=2, seconds=1),
        ("one", "makes no holes"): Counter(a=1),
    }
    assert report.remarks(["another QEMU: no --qemu-root"], failures).splitlines() == [
        "- left out: another QEMU: no --qemu-root",
        "- failed: two: ended with exit code -6: speed (2x); seconds (1x)",
        "- failed: one: makes no holes: a (1x)",
    ]
    assert report.remarks([], {}) == ""
