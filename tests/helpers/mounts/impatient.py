"""The `qedfuse` command, with little patience for hosts that do not answer: `python -m` this module and arguments."""

from __future__ import annotations

import sys

import qedfuse.host.lookups
from qedfuse.cli.main import main

PATIENCE = 2.0

if __name__ == "__main__":
    qedfuse.host.lookups.PATIENCE = PATIENCE
    sys.exit(main())
