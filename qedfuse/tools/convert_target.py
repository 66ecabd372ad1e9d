"""What a conversion fills: a raw disk, or a new QED image. Both are filled in the file itself, since it is known where
a range goes, and it can be shared with another file. (What the engine fills is in `convert_image_target.py`.)
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Protocol, runtime_checkable

from qedfuse.errors import QedfuseError
from qedfuse.host.file_id import FileId
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.output_file import OutputFile, open_output
from qedfuse.host.waiting import checkpoint
from qedfuse.qed.header import Header
from qedfuse.qed.new_image import write_image
from qedfuse.qed.table_writer import SequentialWriter
from qedfuse.sizes import GuestOffset, round_down

#: Zeroing a device can take long: a step that may be cancelled.
_ZERO_STEP = 1 << 30
#: As can sharing so many bytes.
_SHARE_STEP = 256 << 20


class Target(Protocol):
    """A disk to fill, front to back. Offsets and sizes are bytes; functions raise OSError.

    `blank`: what is not written needs no `zero`. `unit`: what is stored is stored in blocks of so many bytes.
    """

    blank: bool
    unit: int

    async def write(self, offset: int, data: memoryview) -> None: ...

    async def zero(self, offset: int, size: int) -> None: ...

    def keep_zeroes(self) -> None:
        """Zeroes that are written shall take space."""
        ...


@runtime_checkable
class FileTarget(Target, Protocol):
    """A target that can also share blocks with other files, in steps of `block_size` bytes."""

    block_size: int

    async def share(self, offset: int, source: FileStorage, start: int, size: int) -> int:
        """Instead of writing it, let the front of a range be what is at `start` in a file. Returns how much of it is
        now; 0: these two do not lie alike on blocks. Raises OSError, one of `REFUSALS` if the host cannot."""
        ...


class RawTarget:
    """A raw disk. See `Target`."""

    unit = 1

    def __init__(self, file: OutputFile) -> None:
        self.blank = file.made
        self.block_size = file.block_size
        self._file = file

    async def write(self, offset: int, data: memoryview) -> None:
        await self._file.write(offset, [data])

    async def share(self, offset: int, source: FileStorage, start: int, size: int) -> int:
        return await _share(self._file, offset, source, start, size)

    async def zero(self, offset: int, size: int) -> None:
        for start in range(offset, offset + size, _ZERO_STEP):
            await checkpoint()
            await self._file.punch(start, min(_ZERO_STEP, offset + size - start))

    def keep_zeroes(self) -> None:
        pass


class NewQedTarget:
    """A new QED image without a backing file. See `FileTarget`."""

    blank = True

    def __init__(self, file: OutputFile, header: Header) -> None:
        self.unit = header.cluster_size
        self.block_size = file.block_size
        self._file = file
        self._writer = SequentialWriter(file, header)

    async def write(self, offset: int, data: memoryview) -> None:
        while len(data):
            host, length = self._writer.place(GuestOffset(offset), len(data))
            await self._file.write(host, [data[:length]])
            await self._writer.take(GuestOffset(offset), length)
            offset, data = offset + length, data[length:]

    async def share(self, offset: int, source: FileStorage, start: int, size: int) -> int:
        host, length = self._writer.place(GuestOffset(offset), size)
        shared = await _share(self._file, host, source, start, length)
        if shared:
            await self._writer.take(GuestOffset(offset), shared)
        return shared

    async def zero(self, offset: int, size: int) -> None:
        pass  # what is not written is zeroes

    def keep_zeroes(self) -> None:
        pass

    async def finish(self) -> None:
        """Complete the file. Raises OSError."""
        await self._writer.finish()
        await self._file.truncate(self._writer.end)


async def _share(file: OutputFile, offset: int, source: FileStorage, start: int, size: int) -> int:
    size = min(round_down(size, file.block_size), _SHARE_STEP)
    if not size or (offset | start) % file.block_size:
        return 0
    await file.share(offset, source, start, size)
    return size


@asynccontextmanager
async def raw_target(path: str, size: int, *, create: bool, sources: Mapping[FileId, str]) -> AsyncIterator[RawTarget]:
    """A raw file of `size` bytes, or a block device with room for them; see `open_output`.

    `create` False: the file must be there, and be large enough; what is behind `size` stays.
    """
    async with open_output(path, create=create, is_image=False, sources=sources) as file:
        if file.made:
            await file.truncate(size)
        else:
            check_room(path, file.size(), size)
        yield RawTarget(file)


@asynccontextmanager
async def new_qed_target(path: str, header: Header, *, sources: Mapping[FileId, str]) -> AsyncIterator[NewQedTarget]:
    """A new image without a backing file; see `open_output`."""
    async with open_output(path, create=True, is_image=True, sources=sources) as file:
        await write_image(file, header)
        target = NewQedTarget(file, header)
        yield target
        await target.finish()


def check_room(path: str, size: int, wanted: int) -> None:
    """Raise ENOSPC if a target that exists is smaller than what it is to hold; bytes."""
    if size < wanted:
        raise QedfuseError(path, f"is smaller ({size} bytes) than the source ({wanted} bytes)", errno.ENOSPC)
