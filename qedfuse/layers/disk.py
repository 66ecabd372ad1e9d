"""A disk that can be written: all that the kernel's requests and the jobs need to know of an image."""

from __future__ import annotations

from typing import Protocol

from qedfuse.host.storage import Buffer
from qedfuse.layers.runs import Run


class Disk(Protocol):
    """A disk that is open. Offsets and sizes are bytes, any alignment, and not negative.

    Errors are OSErrors: what the host said, EROFS unless it is `writable`, EIO ever after a failed sync. A call need
    not be a checkpoint. One that was cancelled may have happened in part, as after a crash.
    """

    @property
    def path(self) -> str:
        """For messages."""
        ...

    @property
    def size(self) -> int:
        """Bytes that the guest sees."""
        ...

    @property
    def writable(self) -> bool: ...

    @property
    def failed(self) -> OSError | None:
        """The error of the sync after which nothing can be written any more."""
        ...

    @property
    def version(self) -> object:
        """Another one whenever the size, or what is a hole, may have changed."""
        ...

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """`size` bytes at `offset`; fewer, or none, at the end of the disk."""
        ...

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`. Past the end the disk grows first: ENOSPC or EFBIG if it cannot."""
        ...

    async def zero(self, offset: int, size: int) -> None:
        """Make a range read as zeroes, as far as it lies inside the disk, and deallocate what can be."""
        ...

    async def discard(self, offset: int, size: int) -> None:
        """Deallocate what lies wholly inside the range; it reads as zeroes. The edges stay as they are."""
        ...

    async def flush(self) -> None:
        """All that was completed before this call is durable when it returns. Once begun it is carried out."""
        ...

    async def resize(self, size: int) -> None:
        """Set the size, rounded up to sectors. What is added reads as zeroes. A smaller size is durable on return, a
        larger one after `flush`. EFBIG past the maximum, EPERM if it is fixed."""
        ...

    async def map(self, offset: int, size: int) -> list[Run]:
        """What the disk itself, without a layer below, has for a range inside it: runs from `offset` on, which may
        cover less than `size` but never nothing of it (for `size` > 0)."""
        ...
