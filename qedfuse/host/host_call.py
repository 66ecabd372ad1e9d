"""What a system call on a host file waits for."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple


class Host(NamedTuple):
    """What a system call waits for: the file system on this `device` (st_dev). `local`: only for its disk, which is
    there. Behind another one is a server, which may not answer."""

    device: int
    local: bool


class HostCall(functools.partial[Any]):
    """A call that waits for `host`."""

    host: Host
