"""What a system call on a host file waits for, and which kind of call it is."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Any, NamedTuple


class Host(NamedTuple):
    """What a system call waits for: the file system on this `device` (st_dev). `local`: only for its disk, which is
    there. Behind another one is a server, which may not answer."""

    device: int
    local: bool


class CallKind(Enum):
    """OTHER: any function. SYNC: an fdatasync of the descriptor that is the one argument, which needs no Python."""

    OTHER = auto()
    SYNC = auto()


class HostCall(NamedTuple):
    """A call that waits for `host`."""

    host: Host
    function: Callable[..., Any]
    args: tuple[object, ...] = ()
    kind: CallKind = CallKind.OTHER

    def __call__(self) -> Any:
        return self.function(*self.args)
