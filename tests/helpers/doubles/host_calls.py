"""System calls as the engine hands them to its workers."""

from __future__ import annotations

from collections.abc import Callable

from qedfuse.host.host_call import Host, HostCall


def local_call(function: Callable[[], object]) -> HostCall:
    """A call that waits for a local disk."""
    return HostCall(Host(0, local=True), function)
