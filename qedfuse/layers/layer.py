"""A layer of a backing chain: it says where its own bytes lie, and another one below supplies what it has not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from qedfuse.host.storage import ReadStorage
from qedfuse.layers.extents import HostExtents
from qedfuse.layers.runs import Run


class Layer(Protocol):
    """One image of a chain, as a source of bytes.

    `path` for messages, `format` as qemu-img names it, `size` in bytes, `backing` the layer below or None.
    """

    path: str
    format: str

    @property
    def storage(self) -> ReadStorage: ...

    @property
    def size(self) -> int: ...

    @property
    def backing(self) -> Layer | None: ...

    @property
    def version(self) -> object:
        """Another one whenever what it has, or what is a hole of it, may have changed."""
        ...

    def map_nowait(self, offset: int, size: int) -> list[Run] | None:
        """Runs that cover exactly [offset, offset+size), or None if tables must be read first (then use `map`).

        The range lies inside the layer. Adjacent runs of one kind that continue each other are merged.
        """
        ...

    async def map(self, offset: int, size: int, extents: HostExtents | None = None) -> list[Run]:
        """As `map_nowait`, reading tables as needed. May cover less than `size`, never nothing (for size > 0).

        `extents`: of `storage`, as a search for data knows them: parts of tables that are holes are not read.
        """
        ...

    async def read_indirect(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of an INDIRECT run at guest `offset`."""
        ...

    async def close(self) -> None:
        """Close this layer's storage and those below it. Idempotent."""
        ...


def layers_of(top: Layer | None) -> Iterator[Layer]:
    """A chain's layers, from the top down; none without a layer."""
    layer = top
    while layer is not None:
        yield layer
        layer = layer.backing
