"""What a conversion in place consists of, as `apply.py` sees it: each pair of formats has a `Converter`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from qedfuse.chain.unfinished import Unfinished
from qedfuse.host.storage import Storage
from qedfuse.progress import Report


class Wanted(NamedTuple):
    """What the caller asks for. Of a new QED image: `cluster_size` (bytes) and `table_size` (clusters), None to choose
    what fits. `force`: what is lost by the conversion, and is not part of the disk, may go."""

    cluster_size: int | None = None
    table_size: int | None = None
    force: bool = False


class Conversion(Protocol):
    """What one conversion does to its file; made by a converter after all refusals.

    `old_size`: bytes of the file now. `new_bytes`: exactly as many come behind the old end; they are reserved, and read
    as zeroes, before anything is written. `altered`: `write_tail` has changed the old image itself, in a way that its
    format allows: it reads as before, but is not the same bytes; False as a rule.
    """

    old_size: int
    new_bytes: int

    @property
    def altered(self) -> bool: ...

    async def write_tail(self, storage: Storage, progress: Report) -> bytes:
        """Write all of the new image but its first sector, which is returned (512 bytes). Only where the old image has
        nothing: at every moment the file is the old image, whatever has reached the disk. Syncs nothing at its end.

        Raises OSError. Failed or cancelled, it has done a part."""
        ...

    async def restore(self, storage: Storage) -> None:
        """After `write_tail`, whatever came of it, instead of a switch: what it has written in front of the old end
        becomes what it was, and the file is going to be cut there. Not called if `altered`. Raises OSError."""
        ...

    async def finish(self, storage: Storage, progress: Report) -> None:
        """When the first sector is durably the new one: give back what only the old image had. At every moment the file
        is the new image. May have been done before, in part or whole. Syncs nothing at its end.

        Raises OSError. Failed or cancelled, it has done a part."""
        ...


class Converter(Protocol):
    """One pair of formats. All that these raise are OSErrors: QedfuseError with what is wrong and what to do, that of
    the host. Only reads."""

    async def plan(self, storage: Storage, wanted: Wanted, progress: Report) -> Conversion:
        """For a file that is an image of the old format, and locked. Refuses what cannot be converted."""
        ...

    async def resume(self, storage: Storage, unfinished: Unfinished) -> Conversion:
        """For a file that is the new image already: only `finish` is called. Refuses a file that is another one."""
        ...

    async def is_unused(self, storage: Storage, unfinished: Unfinished) -> bool:
        """For a file that became the new image just now, or so it seems: whether it holds what `write_tail` has made of
        the old one, and no more, so that nothing is lost with it."""
        ...

    async def old_end(self, storage: Storage, unfinished: Unfinished) -> int:
        """For a file that is the old image, perhaps with a longer tail: where (bytes) the tail may be cut off. That is
        the old size; but more if another program has used the tail for the old image meanwhile."""
        ...
