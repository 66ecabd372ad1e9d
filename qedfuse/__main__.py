"""`python -m qedfuse`."""

import sys

from qedfuse.cli.main import main

sys.exit(main())
