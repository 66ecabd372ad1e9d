"""Which backing files may be opened. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BackingPolicy:
    """Which backing files may be opened, at every level of a chain.

    `allowed` False: none (--no-backing). `root`: only regular files inside this directory, symbolic links followed
    (--backing-root); None: any file or block device. None in a qedfuse mount, whichever: the daemon that opens it might
    wait for itself.
    """

    allowed: bool = True
    root: str | None = None


ANY_BACKING = BackingPolicy()
