"""What the fuzz targets share: the command line, which is libFuzzer's, and the seeds, which stand in for a corpus.

    python -m tests.fuzz.NAME -max_total_time=600 DIRECTORY        ten minutes; inputs are kept in DIRECTORY
    python -m tests.fuzz.NAME -fork=2 -max_total_time=36000 DIRECTORY
    python -m tests.fuzz.NAME crash-0123abc                        one input again, with its traceback

Needs atheris: `pip install .[test]` brings it where it has wheels (x86-64).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

from qedfuse.errors import QedfuseError
from qedfuse.text import describe

MAX_INPUT = 4096
#: Seconds for one input before it counts as a hang.
TIMEOUT = 30
#: MiB.
MEMORY = 1024


def run(target: Callable[[bytes], None], seeds: Mapping[str, bytes]) -> None:
    """Fuzz `target` as the process's arguments say. Ends the process."""
    options = [word for word in sys.argv[1:] if word.startswith("-")]
    paths = [word for word in sys.argv[1:] if not word.startswith("-")]
    with tempfile.TemporaryDirectory(prefix="qedfuse-fuzz-") as scratch:
        if not any(os.path.isfile(path) for path in paths):
            start = Path(scratch, "seeds")
            start.mkdir()
            for name, content in seeds.items():
                (start / name).write_bytes(content)
            paths = [*(paths or [tempfile.mkdtemp(prefix="corpus-", dir=scratch)]), str(start)]
        defaults = [f"-max_len={MAX_INPUT}", f"-timeout={TIMEOUT}", f"-rss_limit_mb={MEMORY}"]
        child = os.fork()  # libFuzzer ends its process without a chance to tidy up
        if not child:
            atheris.Setup([sys.argv[0], *defaults, *options, *paths], target)
            atheris.Fuzz()
        status = os.waitpid(child, 0)[1]
    sys.exit(os.waitstatus_to_exitcode(status))


def assert_plain(error: QedfuseError) -> None:
    line = describe(error)
    assert line.startswith("image: ") and "\n" not in line, line
