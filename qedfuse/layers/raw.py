"""A raw file as the last layer of a chain: bytes at the same offset, nothing below."""

from __future__ import annotations

from qedfuse.host.storage import ReadStorage, size_in_sectors
from qedfuse.layers.extents import HostExtents
from qedfuse.layers.layer import Layer
from qedfuse.layers.runs import Kind, Run
from qedfuse.sizes import HostOffset


class RawLayer:
    """A raw disk. See `layer.Layer`. `storage` is owned and closed with the layer."""

    format = "raw"
    version = 0

    def __init__(self, storage: ReadStorage, size: int) -> None:
        self.path = storage.path
        self.storage = storage
        self._size = size

    @classmethod
    def open(cls, storage: ReadStorage) -> RawLayer:
        """`size` is the file's in whole sectors, taken once: a read-only backing file does not grow under us."""
        return cls(storage, size_in_sectors(storage))

    @property
    def size(self) -> int:
        return self._size

    @property
    def backing(self) -> Layer | None:
        return None

    def map_nowait(self, offset: int, size: int) -> list[Run] | None:
        return [Run(Kind.DATA, size, HostOffset(offset))]

    async def map(self, offset: int, size: int, extents: HostExtents | None = None) -> list[Run]:
        return [Run(Kind.DATA, size, HostOffset(offset))]

    async def read_indirect(self, offset: int, size: int) -> bytes:
        raise AssertionError("a raw file has nothing indirect")

    async def close(self) -> None:
        await self.storage.close()
