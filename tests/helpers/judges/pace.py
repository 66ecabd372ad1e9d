"""How fast this machine runs Python just now: a bound in seconds would judge the machine and its other tenants."""

from __future__ import annotations

import time


def counting(end: int) -> float:
    """Seconds of processor time in which a loop counts to `end`."""
    started = time.thread_time()
    for _ in range(end):
        pass
    return time.thread_time() - started
