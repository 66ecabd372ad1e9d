"""How the benchmark reads what its tools say."""

from __future__ import annotations

import json

import pytest

from tests.bench.measures import Requests, parse_fio


def said(error: int) -> str:
    job = {
        "error": error,
        "read": {"total_ios": 30, "iops": 1.5},
        "write": {"total_ios": 12, "iops": 0.5},
        "trim": {"total_ios": 5, "iops": 9},
    }
    return f"fio: a remark of its own\n{json.dumps({'jobs': [job]})}"


def test_reads_and_writes_are_counted() -> None:
    assert parse_fio(said(0)) == Requests(42, 2.0)


def test_a_failure_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="Software caused connection abort"):
        parse_fio(said(103))
