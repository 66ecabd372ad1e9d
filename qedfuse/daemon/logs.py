"""Where the log goes: stderr in the foreground, else syslog if there is one, or a file.

What is logged names images and backing files, whose names may hold anything at all: see `_make_printable`.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys

from qedfuse.text import printable

_log = logging.getLogger("qedfuse")

_SYSLOG = "/dev/log"


def start_logging(*, foreground: bool, log_file: str | None) -> bool:
    """Set up the process's log. Returns whether there is any. Raises OSError if `log_file` cannot be opened."""
    handler: logging.Handler
    if log_file is not None:
        handler = logging.FileHandler(log_file)
        handler.setFormatter(logging.Formatter("%(asctime)s qedfuse[%(process)d] %(levelname)s: %(message)s"))
    elif foreground:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("qedfuse: %(message)s"))
    elif os.path.exists(_SYSLOG):
        handler = logging.handlers.SysLogHandler(_SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter("qedfuse[%(process)d]: %(message)s"))
    else:
        handler = logging.NullHandler()
    handler.addFilter(_make_printable)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    sys.unraisablehook = _log_unraisable  # what is called from C, or by the collector, has no other place to go
    logging.raiseExceptions = False  # a full disk under the log is no reason to print to a closed stderr
    return not isinstance(handler, logging.NullHandler)


def _log_unraisable(what: sys.UnraisableHookArgs) -> None:
    _log.critical("internal error in %r", what.object, exc_info=what.exc_value)


def _make_printable(record: logging.LogRecord) -> bool:
    """A message is one line, and harmless to a terminal; only the traceback of a bug has more. It is characters."""
    text = printable(record.getMessage())
    record.msg, record.args = text.encode("utf-8", "backslashreplace").decode(), None
    return True
