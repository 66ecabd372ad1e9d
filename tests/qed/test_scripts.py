"""The write order as scripts whose output a person can review; see `script.py` for what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.helpers.judges.script import Script

SCRIPTS = sorted(Path(__file__).with_name("scripts").glob("*.txt"))
assert SCRIPTS


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path, request: pytest.FixtureRequest) -> None:
    """What it says is what happens. `--rewrite` makes it say that: look at the difference before you keep it."""
    wanted = path.read_text()
    found = trio.run(Script().run, wanted)
    if request.config.getoption("--rewrite"):
        path.write_text(found)
    else:
        assert found.splitlines() == wanted.splitlines()
