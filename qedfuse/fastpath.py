"""The native fast path, seen from Python, its only user.

The essay in `native/filter.c` tells how it works and why it is right.

Importing this module loads the filter, which must happen before pyfuse3 is imported: the dynamic linker takes the first
definition that it meets. ImportError: the filter was not built.

What the kernel asks and pyfuse3 has no handler for, FALLOCATE and LSEEK, arrives here, too, and is answered from here.

Source: linux/fuse.h.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from qedfuse.holes import fallocate, next_data, next_hole
from qedfuse.image import Image
from qedfuse.layer import Layer
from qedfuse.raw import RawLayer
from qedfuse.storage import FileStorage

_flags = sys.getdlopenflags()
sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
try:
    from qedfuse import _fastpath as native
finally:
    sys.setdlopenflags(_flags)

#: For tests, in the environment: "pass" lets every request through, "nospin" never polls for the next one.
MODE_VARIABLE = "QEDFUSE_FASTPATH"

_FALLOCATE = 43
_NOTIFY_INVAL_INODE = 2

_OUT_HEADER = struct.Struct("=IiQ")  # length, negative errno or notification, unique
_LSEEK_OUT = struct.Struct("=Q")
_INVAL_INODE_OUT = struct.Struct("=Qqq")  # inode, offset, length (0: to the end)

_log = logging.getLogger("qedfuse")


class FastPath:
    """The filter of this process's mount. `pyfuse3_file`: pyfuse3's library. Raises OSError if libfuse is not there.

    `writeback`: the kernel has the writeback cache on, and may hold data that we do not know of.
    """

    def __init__(self, pyfuse3_file: str, *, writeback: bool) -> None:
        mode = os.environ.get(MODE_VARIABLE)
        self.answers = mode != "pass"
        self._spin = mode != "nospin"
        self._writeback = writeback
        self._images: dict[int, _Attached] = {}
        self._handles: dict[int, Image] = {}
        self._nursery: trio.Nursery | None = None
        # Threads of their own: what they wait for may need one of trio's.
        self._write_backs = trio.CapacityLimiter(8)
        native.bind(pyfuse3_file)

    @property
    def bound(self) -> bool:
        """Whether requests come by the filter; known when the first one has arrived."""
        return self.counters["calls"] > 0

    @property
    def counters(self) -> dict[str, int]:
        """Since the process began: `calls` of the filter, `reads` and `writes` answered, requests `passed` on to Python
        (`missed` of these because they needed a disk), `handed` to the handlers here, `spins` and those `spun`
        successfully."""
        return native.counters()

    @property
    def in_python(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """To be called before and after Python's work on a request, for the filter to know whether there is any."""
        return native.enter, native.leave

    @property
    def sync_asked(self) -> Callable[[], bool]:
        """To be called first thing in a write's handler: whether the write must be durable when it is answered."""
        return native.sync_asked

    # -- handles ------------------------------------------------------------------------------------------------------

    def attach(self, fh: int, image: Image, *, to_write: bool, synced: bool) -> None:
        """Answer requests for an open file, writes only if they need not be `synced` each."""
        attached = self._images.get(id(image))
        if attached is None:
            attached = self._images[id(image)] = _Attached(image)
        attached.handles += 1
        self._handles[fh] = image
        if to_write:
            attached.writers.add(fh)
        native.attach(fh, attached.top, to_write and not synced)

    def detach(self, fh: int) -> None:
        """The file is closed. To be called before its image may be closed; nothing happens if it is not attached."""
        image = self._handles.pop(fh, None)
        if image is None:
            return
        native.detach(fh)
        attached = self._images[id(image)]
        attached.handles -= 1
        attached.writers.discard(fh)
        if not attached.handles:
            attached.forget()
            del self._images[id(image)]

    # -- what pyfuse3 has no handler for ------------------------------------------------------------------------------

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Filter requests, and answer those that are handed over, during the block, in which pyfuse3.main runs."""
        async with trio.open_nursery() as self._nursery:
            native.configure(self.answers, spin=self._spin, hand_over=self._hand_over)
            try:
                yield
            finally:
                native.configure(False)
                self._nursery.cancel_scope.cancel()

    def _hand_over(
        self, fd: int, opcode: int, unique: int, node: int, fh: int, offset: int, length: int, mode: int
    ) -> None:
        """A request, from C, in the middle of a system call of pyfuse3's: only start a task."""
        assert self._nursery is not None
        image = self._handles[fh]
        if opcode == _FALLOCATE:
            self._nursery.start_soon(self._answer_fallocate, fd, unique, image, mode, offset, length)
        else:
            self._nursery.start_soon(self._answer_seek, fd, unique, image, node, offset, mode)

    async def _answer_fallocate(self, fd: int, unique: int, image: Image, mode: int, offset: int, length: int) -> None:
        code = 0
        try:
            await fallocate(image, mode, offset, length)
        except Exception as error:
            code = _errno_of(error, image)
        _send(fd, code, unique)

    async def _answer_seek(self, fd: int, unique: int, image: Image, node: int, offset: int, whence: int) -> None:
        try:
            found = await self._seek(fd, image, node, offset, whence)
        except Exception as error:
            _send(fd, _errno_of(error, image), unique)
        else:
            _send(fd, 0, unique, _LSEEK_OUT.pack(found))

    async def _seek(self, fd: int, image: Image, node: int, offset: int, whence: int) -> int:
        """Where the data or the hole is, once the kernel has handed out the data that it may still have for a hole.

        The kernel does not do that itself before it asks. Nothing can be written meanwhile but through mmap: it holds
        the file's lock. With nobody left who can write, it has handed out everything: it does so before it tells us of
        a close.
        """
        written_back = -1
        while True:
            data = await next_data(image, offset)
            found: int | None = data
            hole = offset
            if whence == os.SEEK_HOLE and data == offset:
                found = hole = await next_hole(image, offset)
                data = await next_data(image, hole)
            elif whence == os.SEEK_HOLE:
                found = offset
            cached = self._writeback and id(image) in self._images and self._images[id(image)].writers
            if cached and data != hole and hole != written_back:
                await self._write_back(fd, node, hole, 0 if data is None else data - hole)
                written_back = hole
                continue
            if found is None or offset >= image.size:
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            return found

    async def _write_back(self, fd: int, node: int, offset: int, length: int) -> None:
        """Let the kernel write what it has for a range of a file, and forget it. The writes are served meanwhile; when
        nobody serves them any more, a cancellation does not wait."""
        data = _INVAL_INODE_OUT.pack(node, offset, length)
        message = _OUT_HEADER.pack(_OUT_HEADER.size + len(data), _NOTIFY_INVAL_INODE, 0) + data
        try:
            await trio.to_thread.run_sync(os.write, fd, message, abandon_on_cancel=True, limiter=self._write_backs)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the kernel has forgotten the file: it has nothing
                raise


class _Attached:
    """An open image as C sees it."""

    def __init__(self, image: Image) -> None:
        self.handles = 0
        self.writers: set[int] = set()
        self._image = image
        self._watched: list[Image] = []
        self.top = self._native(image)

    def _native(self, image: Image) -> native.Layer:
        chain: list[Layer] = [image]
        while chain[-1].backing is not None:
            chain.append(chain[-1].backing)
        below: native.Layer | None = None
        for layer in reversed(chain[1:]):
            below = self._layer(layer, below)
        return self._layer(image, below, top=True)

    def _layer(self, layer: Layer, below: native.Layer | None, top: bool = False) -> native.Layer:
        fd = layer.storage.fileno() if isinstance(layer.storage, FileStorage) else -1
        if isinstance(layer, RawLayer):
            return native.Layer(fd, layer.size)
        if not isinstance(layer, Image):
            return native.Layer(-1, layer.size)
        l1, l2 = native.PageIndex(), native.PageIndex()
        layer.tables.l1.watch(l1)
        layer.tables.l2.watch(l2)
        self._watched.append(layer)
        size, file_end, *_ = layer.state()
        return native.Layer(
            fd,
            size,
            file_end=file_end,
            data_start=layer.header.header_bytes,
            cluster_bits=layer.geometry.cluster_bits,
            table_bits=layer.geometry.table_entries.bit_length() - 1,
            l1=l1,
            l2=l2,
            below=below,
            state=layer.state if top else None,
            wrote=layer.note_written if top else None,
        )

    def forget(self) -> None:
        for image in self._watched:
            image.tables.l1.watch(None)
            image.tables.l2.watch(None)


def _errno_of(error: Exception, image: Image) -> int:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    _log.error("%s: internal error: %r", image.path, error, exc_info=error)
    return errno.EIO


def _send(fd: int, code: int, unique: int, data: bytes = b"") -> None:
    """Reply to the kernel."""
    try:
        os.write(fd, _OUT_HEADER.pack(_OUT_HEADER.size + len(data), -code, unique) + data)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits any more; unmounted
            _log.error("cannot reply to the kernel: %s", error.strerror)
