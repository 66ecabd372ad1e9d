"""The signals that ask a process to end."""

from __future__ import annotations

import signal

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def ending_signals() -> list[signal.Signals]:
    """Without those that the caller has told us to ignore: nohup(1), a shell's `command &`."""
    return [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
