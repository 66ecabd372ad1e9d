"""Runs: what one layer knows of a guest range, as a value. Pure."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from qedfuse.sizes import HostOffset


class Kind(IntEnum):
    """What a layer knows of a range."""

    UNALLOCATED = 0  # the layer below has it, or it is zeroes
    ZERO = 1  # zeroes, whatever lies below
    DATA = 2  # at `host` in the layer's storage
    INDIRECT = 3  # stored, but not byte for byte (compressed): ask `read_indirect`


#: The `host` of what is not stored.
NO_PLACE = HostOffset(0)


class Run(NamedTuple):
    """A range of one layer, in guest order. `length` in bytes; `host` is a byte offset: of DATA, and of a ZERO that has
    a place in the file all the same (otherwise 0)."""

    kind: Kind
    length: int
    host: HostOffset = NO_PLACE


def append_run(runs: list[Run], kind: Kind, length: int, host: HostOffset = NO_PLACE) -> None:
    """Append a run, or make the last one longer if the new one continues it."""
    if runs:
        last = runs[-1]
        if last.kind is kind and (last.host + last.length if last.host or kind is Kind.DATA else 0) == host:
            runs[-1] = Run(kind, last.length + length, last.host)
            return
    runs.append(Run(kind, length, host))
