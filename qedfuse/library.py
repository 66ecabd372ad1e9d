"""An image as other programs use it: what `import qedfuse` offers.

The engine (`image.py`) trusts its callers and waits only where it must: the kernel's requests come to it as they are,
tens of thousands in a second. A program's calls come by way of here. Their arguments are checked before anything
happens, they are checkpoints, as all calls of trio's are, and a large one is done in steps, between which other tasks
have their turn.
"""

from __future__ import annotations

import errno
import operator
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, SupportsIndex

import trio
from trio.lowlevel import checkpoint, enable_ki_protection

from qedfuse.chain.opening import open_image as open_engine
from qedfuse.chain.policy import ANY_BACKING, BackingPolicy
from qedfuse.errors import QedfuseError, ReadOnlyError
from qedfuse.host.offload import to_its_end
from qedfuse.layers.runs import Run
from qedfuse.qed.header import Header
from qedfuse.qed.image import Image as Engine

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Bytes of a read or a write that are moved before other tasks have their turn: less than a millisecond of copying, and
#: for a write a few clusters at once, so that they get to lie in one piece.
_READ_STEP = 1 << 20
_WRITE_STEP = 4 << 20


@asynccontextmanager
@enable_ki_protection
async def open_image(
    path: str | os.PathLike[str],
    *,
    read_only: bool = False,
    fixed_size: bool = False,
    share: bool = False,
    policy: BackingPolicy = ANY_BACKING,
) -> AsyncIterator[Image]:
    """A QED image with its backing chain, locked, checked if it was not closed cleanly, and committed on a timer.

    `read_only` writes nothing, not even to an unclean image, and is never chosen for the caller: a file that cannot be
    opened for writing raises the host's EACCES, EPERM or EROFS. `share` takes and honours no locks; only with
    `read_only`, for a look at an image in use. With `fixed_size` writing past the end is ENOSPC and resizing EPERM.
    `policy` says which backing files may be opened.

    On leaving, calls in progress are waited for, later ones raise EBADF, and the image is flushed and closed, also when
    the block fails or is cancelled. If closing fails, its error is raised, unless the block has failed, in which case
    it goes to the log; what was not flushed before may be lost then. A `flush` that has failed for want of space can be
    tried again before that.

    Raises OSError: QedfuseError with a plain message (not QED, in use, corrupt, backing file missing or refused), or
    the host's errors. Cancelled while it opens, it leaves nothing open.
    """
    if not isinstance(policy, BackingPolicy):
        raise TypeError(f"policy must be a BackingPolicy, not {type(policy).__name__}")
    async with open_engine(
        os.fsdecode(path), read_only=read_only, fixed_size=fixed_size, share=share, policy=policy
    ) as engine:
        image = Image(engine)
        try:
            yield image
        finally:
            await image._gate.close()


class Image:
    """A QED image that is open; made by `open_image`.

    Offsets and sizes are bytes, any alignment, and any integers (`operator.index`): TypeError for what is none,
    ValueError for a negative one; the image is untouched then. Other errors are OSErrors: what the host said, EROFS on
    a read-only image, EIO for a corrupt table and ever after a failed sync, EBADF outside of the block.

    Every call is a checkpoint of trio's, before its work and again between the steps of a large one (a few MiB). Calls
    of other tasks may come in between two steps. A change that was cancelled may have happened in part, as after a
    crash, and the image stays consistent; one that has done its work returns, whatever is cancelled. So it is with a
    KeyboardInterrupt.

    Any number of tasks may call at the same time, but only in the `trio.run` in which the image was opened
    (RuntimeError): other threads call by way of `trio.from_thread`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._gate = _Gate(engine.path)

    @property
    def path(self) -> str:
        """As it was opened."""
        return self._engine.path

    @property
    def size(self) -> int:
        """Bytes that the guest sees."""
        return self._engine.size

    @property
    def writable(self) -> bool:
        return self._engine.writable

    @property
    def fixed_size(self) -> bool:
        return self._engine.fixed_size

    @property
    def header(self) -> Header:
        """As in the file, or on its way there."""
        return self._engine.header

    @property
    def backing(self) -> str | None:
        """The path of the backing file."""
        return self._engine.backing.path if self._engine.backing else None

    @property
    def failed(self) -> OSError | None:
        """The error of the sync after which the image became read-only."""
        return self._engine.failed

    # -- reading ------------------------------------------------------------------------------------------------------

    @enable_ki_protection
    async def read(self, offset: SupportsIndex, size: SupportsIndex) -> bytes | bytearray:
        """`size` bytes at `offset`; fewer, or none, at the end of the image."""
        start, wanted = _number("offset", offset), _number("size", size)
        await checkpoint()
        wanted = max(0, min(wanted, self.size - start))
        if wanted <= _READ_STEP:
            with self._gate:
                return await self._engine.read(start, wanted)
        result = bytearray()  # grows with its content: to clear a gigabyte takes half a second
        for position, length in _steps(start, wanted, _READ_STEP):
            with self._gate:
                part = await self._engine.read(position, length)
            result += part
            if len(part) < length:  # the image has shrunk meanwhile
                break
            await checkpoint()
        return result

    @enable_ki_protection
    async def map(self, offset: SupportsIndex, size: SupportsIndex) -> list[Run]:
        """What the image itself, without its backing file, has for a range: see `Run`.

        The runs begin at `offset`, and are as many as a few milliseconds give: they may cover less than `size`. None at
        the end of the image. What has a place in the file is DATA, also where the host has a hole there.
        """
        start, wanted = _number("offset", offset), _number("size", size)
        await checkpoint()
        with self._gate:
            wanted = min(wanted, self.size - start)
            return await self._engine.map(start, wanted) if wanted > 0 else []

    # -- writing ------------------------------------------------------------------------------------------------------

    @enable_ki_protection
    async def write(self, offset: SupportsIndex, data: Buffer) -> None:
        """Write all of `data` at `offset`: anything that lies in memory in one piece (else BufferError), and does not
        change meanwhile.

        Past the end, the image grows first (ENOSPC if its size is fixed, EFBIG if its geometry cannot map it). Zeroes
        written over what reads as zeroes anyway allocate nothing.
        """
        start = _number("offset", offset)
        with _bytes_of(data) as view:
            for position, length in _steps(start, len(view), _WRITE_STEP):
                await checkpoint()
                with self._writing(), view[position - start : position - start + length] as part:
                    await self._engine.write(position, part)

    @enable_ki_protection
    async def zero(self, offset: SupportsIndex, size: SupportsIndex) -> None:
        """Make a range read as zeroes, as far as it lies inside the image; whole clusters are deallocated."""
        start, wanted = _number("offset", offset), _number("size", size)
        await checkpoint()
        with self._writing():
            await self._engine.zero(start, wanted)

    @enable_ki_protection
    async def discard(self, offset: SupportsIndex, size: SupportsIndex) -> None:
        """Deallocate the clusters that lie wholly inside the range; they read as zeroes. The edges stay as they are."""
        start, wanted = _number("offset", offset), _number("size", size)
        await checkpoint()
        with self._writing():
            await self._engine.discard(start, wanted)

    # -- size and durability ------------------------------------------------------------------------------------------

    @enable_ki_protection
    async def resize(self, size: SupportsIndex) -> None:
        """Set the image's size in bytes, rounded up to 512. What is added reads as zeroes, what is cut off is gone, up
        to the byte. A smaller size is durable on return, a larger one after `flush`. Raises EFBIG past the geometry's
        maximum, EPERM if the size is fixed. Cancelled: `size` tells whether it has happened.
        """
        wanted = _number("size", size)
        await checkpoint()
        with self._writing():
            await self._engine.resize(wanted)

    @enable_ki_protection
    async def flush(self) -> None:
        """Everything completed before this call is durable when it returns. Nothing to do on a read-only image.

        Raises OSError, EIO ever after a failed sync. Its commit, once begun, is carried out, whatever is cancelled.
        """
        await checkpoint()
        with self._gate:
            await self._engine.flush()

    def _writing(self) -> _Gate:
        if not self.writable:
            raise ReadOnlyError(self.path, "is open read-only")
        return self._gate


class _Gate:
    """What every step of a call goes through: `with gate:`. Closing waits for those inside, and lets no more in."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._run = trio.lowlevel.current_trio_token()
        self._inside = 0
        self._closed = False
        self._empty = trio.Event()

    def __enter__(self) -> None:
        if trio.lowlevel.current_trio_token() is not self._run:
            raise RuntimeError(f"{self._path}: the image belongs to the trio.run in which it was opened")
        if self._closed:
            raise QedfuseError(self._path, "the image is closed", errno.EBADF)
        self._inside += 1

    def __exit__(self, *_exception: object) -> None:
        self._inside -= 1
        if self._closed and not self._inside:
            self._empty.set()

    async def close(self) -> None:
        self._closed = True
        if self._inside:
            await to_its_end(self._empty.wait)


def _number(name: str, value: SupportsIndex) -> int:
    """An offset or a size that a caller gave. Raises TypeError, ValueError."""
    number = operator.index(value)
    if number < 0:
        raise ValueError(f"{name} must not be negative")
    return number


def _bytes_of(data: Buffer) -> memoryview:
    """The memory behind `data`, byte by byte. Raises TypeError, BufferError."""
    view = memoryview(data)
    if not view.c_contiguous:
        raise BufferError("data must lie in memory in one piece (C-contiguous)")
    return view.cast("B")


def _steps(offset: int, size: int, step: int) -> Iterator[tuple[int, int]]:
    """A range in parts (offset, size) that end at multiples of `step`: at least one, of nothing if there is nothing."""
    end = offset + size
    while True:
        stop = min(end, offset - offset % step + step)
        yield offset, stop - offset
        offset = stop
        if offset >= end:
            return
