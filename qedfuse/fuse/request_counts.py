"""How many requests of the kernel were answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qedfuse.fuse.fastpath import FastPath


class RequestCounts:
    """`reads`, `writes`, `syncs`: answered by pyfuse3's handlers, which count them here. The fast path counts its own
    in C; `totals` has all."""

    def __init__(self, fastpath: FastPath | None) -> None:
        self.reads = 0
        self.writes = 0
        self.syncs = 0
        self._fastpath = fastpath

    def totals(self) -> dict[str, int]:
        """By kind of request."""
        native = self._fastpath.counters if self._fastpath else {}
        return {
            "read": self.reads + native.get("reads", 0),
            "write": self.writes + native.get("writes", 0),
            "fsync": self.syncs + native.get("syncs", 0),
        }
