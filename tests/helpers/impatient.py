"""The `qedfuse` command, with little patience for hosts that do not answer: python -m tests.helpers.impatient ..."""

from __future__ import annotations

import sys

import qedfuse.threads
from qedfuse.cli.main import main

PATIENCE = 2.0

if __name__ == "__main__":
    qedfuse.threads.PATIENCE = PATIENCE
    sys.exit(main())
