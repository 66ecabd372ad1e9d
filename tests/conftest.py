"""At the end of a run: the figures that the tests have printed, in lines that begin with `figures:`."""

from __future__ import annotations

import pytest

PREFIX = "figures: "


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports(""):
        if report.when == "teardown":  # which has what was printed before, too
            for line in report.capstdout.splitlines():
                if line.startswith(PREFIX):
                    terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}: {line.removeprefix(PREFIX)}")
