"""The native fast path, seen from Python, its only user.

The essay in `native/fastpath/filter.c` tells how it works and why it is right.

Importing this module loads the filter, which must happen before pyfuse3 is imported: the dynamic linker takes the first
definition that it meets. ImportError: the filter was not built.

What it hands over to Python is answered by `bypass.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from qedfuse.chain.chain import MAX_DEPTH
from qedfuse.fuse.bypass import HandOver, Opener
from qedfuse.fuse.image_slot import ImageSlot
from qedfuse.host.file_storage import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    INLINE_WRITE_LIMIT,
    FileStorage,
)
from qedfuse.host.offload import sync_with
from qedfuse.layers.layer import Layer, layers_of
from qedfuse.layers.raw import RawLayer
from qedfuse.layers.runs import Kind
from qedfuse.qed.geometry import MAX_CLUSTER_SIZE, MAX_TABLE_SIZE, UNALLOCATED, ZERO_CLUSTER
from qedfuse.qed.image import Image
from qedfuse.qed.native_view import NativeView
from qedfuse.sizes import ENTRY_SIZE, PAGE_BITS, PAGE_ENTRIES, PAGE_SIZE

_flags = sys.getdlopenflags()
sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
try:
    from qedfuse.native import _fastpath as native
finally:
    sys.setdlopenflags(_flags)

#: What both sides know.
_SHARED = {
    "PAGE_SIZE": PAGE_SIZE,
    "PAGE_BITS": PAGE_BITS,
    "PAGE_ENTRIES": PAGE_ENTRIES,
    "MAX_CLUSTER_SIZE": MAX_CLUSTER_SIZE,
    "MAX_TABLE_ENTRIES": MAX_TABLE_SIZE * MAX_CLUSTER_SIZE // ENTRY_SIZE,
    "MAX_DEPTH": MAX_DEPTH,
    "MAX_IO": INLINE_WRITE_LIMIT,
    "UNALLOCATED": Kind.UNALLOCATED,
    "ZERO": Kind.ZERO,
    "DATA": Kind.DATA,
    "FALLOC_FL_KEEP_SIZE": FALLOC_FL_KEEP_SIZE,
    "FALLOC_FL_PUNCH_HOLE": FALLOC_FL_PUNCH_HOLE,
    "FALLOC_FL_ZERO_RANGE": FALLOC_FL_ZERO_RANGE,
}
for _name, _value in _SHARED.items():
    if getattr(native, _name, None) != _value:
        raise ImportError(f"{_name} is another one in C")
assert (Kind.UNALLOCATED, Kind.ZERO) == (UNALLOCATED, ZERO_CLUSTER)

#: For tests, in the environment: "pass" lets every request through, "nospin" never polls for the next one.
MODE_VARIABLE = "QEDFUSE_FASTPATH"


class FastPath:
    """The filter of this process's mount. `pyfuse3_file`: pyfuse3's library. Raises OSError if libfuse is not there, or
    no memory for a request.

    `cached`: the kernel has a page cache, and may hold data that we do not know of: written ones if its `writeback`
    cache is on, stores into shared maps in any case. `maps`: it may also have such maps of files that are open past its
    cache, if it knows how.
    """

    def __init__(self, pyfuse3_file: str, *, cached: bool, writeback: bool, maps: bool) -> None:
        mode = os.environ.get(MODE_VARIABLE)
        self.answers = mode != "pass"
        self._spin = mode != "nospin"
        self._cached = cached
        self._writeback = writeback
        self._maps = maps
        self._attached: dict[ImageSlot, _Attached] = {}
        self._handles: dict[int, ImageSlot] = {}
        native.bind(pyfuse3_file)
        if self.answers:
            sync_with(native.Syncer)

    @property
    def bound(self) -> bool:
        """Whether requests come by the filter; known when the first one has arrived."""
        return self.counters["calls"] > 0

    @property
    def counters(self) -> dict[str, int]:
        """Since the process began: `calls` of the filter, `reads`, `writes`, `syncs` and `opens` answered, requests
        `passed` to pyfuse3 and `handed` over (`missed` of all these because they needed a disk), `spins` for the next
        request and those `spun` successfully, reads that `waits` counts as having waited for the disk, `waited`
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

    @property
    def direct_maps(self) -> bool:
        """Whether a file that is open past the kernel's cache can be mapped shared: known once the kernel and we have
        agreed on the protocol."""
        return native.direct_maps()

    # -- handles ------------------------------------------------------------------------------------------------------

    def attach(self, fh: int, slot: ImageSlot, *, to_write: bool, synced: bool) -> None:
        """Answer requests for an open file, writes only if they need not be `synced` each."""
        attached = self._attached.get(slot)
        if attached is None:
            attached = self._attached[slot] = _Attached(slot)
        self._handles[fh] = slot
        attached.add(fh, to_write=to_write, synced=synced)

    def detach(self, fh: int) -> None:
        """The file is closed. To be called before its image may be closed; nothing happens if it is not attached."""
        slot = self._handles.pop(fh, None)
        if slot is not None and not self._attached[slot].drop(fh):
            del self._attached[slot]

    @asynccontextmanager
    async def serving(self, opener: Opener) -> AsyncIterator[None]:
        """Filter requests, and answer those that are handed over, OPENs by `opener`, during the block, in which
        pyfuse3.main runs."""
        async with trio.open_nursery() as nursery:
            has_writers = self._has_writers if self._cached or self._maps else None
            handlers = HandOver(nursery, self._handles, has_writers, self.in_python, opener)
            native.configure(
                self.answers, spin=self._spin, maps=self._maps, writeback=self._writeback, handlers=handlers
            )
            try:
                yield
            finally:
                native.configure(False)
                nursery.cancel_scope.cancel()

    def _has_writers(self, slot: ImageSlot) -> bool:
        attached = self._attached.get(slot)
        return (self._cached or self.direct_maps) and attached is not None and bool(attached.writers)


class _Attached:
    """An open image as C sees it; the slot's observer for as long as it has handles."""

    def __init__(self, slot: ImageSlot) -> None:
        self.writers: set[int] = set()
        self._slot = slot
        self._handles: dict[int, bool] = {}  # whether writes may be answered
        self._views: list[NativeView] = []
        self._top: native.Layer | None = None  # None: hidden
        if slot.ready is not None:
            self._top = self._native(slot.ready)
        slot.observers.append(self)

    def add(self, fh: int, *, to_write: bool, synced: bool) -> None:
        if to_write:
            self.writers.add(fh)
        self._handles[fh] = to_write and not synced
        self._attach(fh)

    def drop(self, fh: int) -> bool:
        """Returns whether others are left."""
        native.detach(fh)
        del self._handles[fh]
        self.writers.discard(fh)
        if not self._handles:
            self._slot.observers.remove(self)
            self._forget()
        return bool(self._handles)

    def hide(self) -> None:
        for fh in self._handles:
            native.suspend(fh)
        self._forget()

    def show(self, image: Image) -> None:
        self._top = self._native(image)
        for fh in self._handles:
            self._attach(fh)

    def _attach(self, fh: int) -> None:
        if self._top is not None:
            native.attach(fh, self._top, self._handles[fh])
        else:
            native.suspend(fh)

    def _native(self, image: Image) -> native.Layer:
        below: native.Layer | None = None
        for layer in reversed([*layers_of(image.backing)]):
            below = self._layer(layer, below)
        return self._layer(image, below)

    def _layer(self, layer: Layer, below: native.Layer | None) -> native.Layer:
        fd = layer.storage.fileno() if isinstance(layer.storage, FileStorage) and layer.storage.local else -1
        if isinstance(layer, RawLayer):
            return native.Layer(fd, layer.size)
        if not isinstance(layer, Image):
            return native.Layer(-1, layer.size)
        view = NativeView(layer)
        seen = native.Layer(fd, layer.size, view=view, below=below)
        view.watch(seen.l1, seen.l2)
        self._views.append(view)
        return seen

    def _forget(self) -> None:
        for view in self._views:
            view.watch(None, None)
        self._views = []
        self._top = None
