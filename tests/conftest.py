"""What holds for a whole run, and where tests of mounts have their files.

At its end: the figures that the tests have printed, in lines that begin with `figures:`.

Signals: a process in the background ignores SIGINT, and one under nohup(1) SIGHUP, and so would every process that a
test starts. A handler is not handed on to those, so here both have one; that for SIGHUP does nothing. SIGTERM, by which
timeout(1) ends a run, does what SIGINT does: the test that runs cleans up, so that no mount and no daemon is left.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

PREFIX = "figures: "

#: Tells the workers of a run what it has begun with.
_NOHUP = "QEDFUSE_TEST_NOHUP"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="write the output of tests/qed/scripts anew")


def pytest_configure() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN or _NOHUP in os.environ:
        os.environ[_NOHUP] = "1"
        signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports(""):
        if report.when == "teardown":  # which has what was printed before, too
            for line in report.capstdout.splitlines():
                if line.startswith(PREFIX):
                    terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}: {line.removeprefix(PREFIX)}")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory for images."""
    path = tmp_path / "images"
    path.mkdir()
    return path


@pytest.fixture
def point(tmp_path: Path) -> Path:
    """A directory to mount over."""
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A file to mount over."""
    path = tmp_path / "disk.raw"
    path.touch()
    return path
