"""The kernel's requests, translated into calls of the engine and of the tree, and errors into errnos. Nothing else.

`read` and `write` are the hot path: a dictionary lookup, and the engine's `_nowait` call if that is enough.

Extended attributes stay unimplemented: with them the kernel would ask for `security.capability` before each write.
Source: pyfuse3's `Operations`; fuse(4), Linux fs/fuse/.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, NoReturn, ParamSpec, Protocol, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from qedfuse.fuse.attributes import Attributes, directory_attributes
from qedfuse.fuse.bypass import Request, send
from qedfuse.fuse.complaints import Complaints, Unopened
from qedfuse.fuse.image_slot import ImageSlot
from qedfuse.fuse.node import Entry, Node
from qedfuse.fuse.options import MountOptions
from qedfuse.fuse.orphaned import check_not_orphaned
from qedfuse.fuse.oversize import Oversize
from qedfuse.fuse.request_counts import RequestCounts
from qedfuse.fuse.setattr import change_owner, change_times
from qedfuse.fuse.shown import attributes_now, attributes_of, refresh
from qedfuse.fuse.space import space_of
from qedfuse.fuse.tree import ROOT, Tree
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.lookups import look
from qedfuse.qed.image import Image

if TYPE_CHECKING:
    from qedfuse.fuse.fastpath import FastPath

P = ParamSpec("P")
T = TypeVar("T")

#: Seconds for which the kernel believes attributes, and names that may change.
ATTRIBUTES_TIMEOUT = 1.0
NAMES_TIMEOUT = 1.0
FIXED_NAMES_TIMEOUT = 3600.0

_SYNC_FLAGS = os.O_SYNC | os.O_DSYNC


class Times(Protocol):
    """Tells the kernel times that it does not ask for: `daemon/kernel_times.py`."""

    async def update(self, node: Node) -> None:
        """A handle on a file mount's root, or one that writes past the cache, is being closed."""

    def tells(self, node: Node, mtime_ns: int) -> bool:
        """Whether a SETATTR may be of its making: the image file has had this time, and may have a later one."""

    def update_soon(self, node: Node) -> None:
        """Somebody looks at a file that is being written past the cache. Returns at once."""


@dataclass(frozen=True, slots=True)
class Handle:
    """An open file. `writes_directly`: past the kernel's page cache. `synced`: each write is durable when answered."""

    slot: ImageSlot
    node: Node
    writes: bool = False
    writes_directly: bool = False
    synced: bool = False


class _Opened(NamedTuple):
    """The number of a file's handle. `direct`: reads and writes are past the kernel's cache. `keep_cache`: what is
    there is valid."""

    handle: int
    direct: bool
    keep_cache: bool


def _nothing() -> None:
    """Without the fast path it is not counted which requests Python works on."""


def _no() -> bool:
    return False


def _translated(
    handler: Callable[Concatenate[Operations, P], Awaitable[T]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, T]]:
    """A handler whose exceptions become errnos. pyfuse3 ends the mount on anything but a FUSEError."""

    async def translated(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._enter()
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:
            raise FUSEError(self.complaints.errno_of(error, handler.__name__.lstrip("_"))) from None
        finally:
            self._leave()

    return translated


class Operations(pyfuse3.Operations):
    """The handlers. `host` is the status that the root directory shows, in a mount over a directory.

    `initialized`: the kernel and we have agreed on the protocol. `settling`: the mount is not announced yet. Its owner
    is the daemon's user, who may then tell the kernel the times of a file mount, and the image's are not to be changed
    by that (see `kernel_times.py`). `times`: told when the kernel must be told times, with the writeback cache.
    """

    supports_dot_lookup = False

    def __init__(
        self, tree: Tree, options: MountOptions, host: os.stat_result, fastpath: FastPath | None = None
    ) -> None:
        super().__init__()
        self.enable_writeback_cache = options.writeback
        self.initialized = trio.Event()
        self.settling = True
        self.counts = RequestCounts(fastpath)
        self.times: Times | None = None
        self.oversize: Oversize | None = None
        self.complaints = Complaints()
        self.unopened = Unopened()
        self._tree = tree
        self._options = options
        self._host = host
        self._fastpath = fastpath
        self._enter, self._leave = fastpath.in_python if fastpath else (_nothing, _nothing)
        # Of a write past its cache that must be durable the kernel says so in the request only, which pyfuse3 does not
        # show; after any other it asks for an fsync.
        self._sync_asked = fastpath.sync_asked if fastpath else _no
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, list[Entry]] = {}
        self._next_handle = 1
        self._names_timeout = NAMES_TIMEOUT if tree.sources else FIXED_NAMES_TIMEOUT

    def init(self) -> None:
        self.initialized.set()

    # -- data ---------------------------------------------------------------------------------------------------------

    async def read(self, fh: int, off: int, size: int) -> bytes:
        self._enter()
        try:
            slot = self._handles[fh].slot
            data = slot.ready.read_nowait(off, size) if slot.ready is not None else None
            if data is None:
                async with slot as image:
                    data = await image.read(off, size)
            self.counts.reads += 1
            return data  # type: ignore[return-value]  # pyfuse3 takes any buffer
        except Exception as error:
            raise FUSEError(self.complaints.errno_of(error, "read")) from None
        finally:
            self._leave()

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self._enter()
        try:
            handle = self._handles[fh]
            slot = handle.slot
            durable = handle.synced or self._sync_asked()
            if durable or slot.ready is None or not slot.ready.write_nowait(off, buf):
                async with slot as image:
                    if not durable or not image.write_nowait(off, buf):
                        await image.write(off, buf)
                    if durable:
                        await image.flush()
                        await check_not_orphaned(image)
            self.counts.writes += 1
            return len(buf)
        except Exception as error:
            code = self.complaints.errno_of(error, "write")
            if code == errno.EFBIG and self.oversize:
                self.oversize.note(handle.node, off, len(buf))
            raise FUSEError(code) from None
        finally:
            self._leave()

    @_translated
    async def fsync(self, fh: int, datasync: bool) -> None:
        self.counts.syncs += 1
        async with self._handles[fh].slot as image:
            await image.flush()
            await check_not_orphaned(image)

    @_translated
    async def flush(self, fh: int) -> None:
        """close(2): promises nothing, but is the last chance to tell a writer that something was lost."""
        handle = self._handles[fh]
        # It waits for an image that is being replaced: one that has failed cannot be, and stays with its error.
        async with handle.slot as image:
            if image.failed is not None and handle.writes:
                raise image.failed
        # Without the slot: the kernel has a SETATTR answered for that.
        if self.times and (handle.node.id == ROOT or handle.writes_directly):
            await self.times.update(handle.node)

    # -- files --------------------------------------------------------------------------------------------------------

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        opened = await self._open(inode, flags)
        return FileInfo(fh=opened.handle, direct_io=opened.direct, keep_cache=opened.keep_cache)

    async def answer_open(self, request: Request, inode: int, flags: int) -> None:
        """`open`, with writers that need not wait for each other."""
        try:
            opened = await self._open(inode, flags)
        except FUSEError as error:
            send(request.reply, error.errno)
        else:
            if not send(partial(request.reply_open, direct=opened.direct, keep_cache=opened.keep_cache), opened.handle):
                await self.release(opened.handle)

    @_translated
    async def _open(self, inode: int, flags: int) -> _Opened:
        node = self._tree.node(inode)
        to_write = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        slot = await self._acquire(node, to_write=to_write)
        try:
            async with slot as image:
                if to_write and not image.writable:
                    raise FUSEError(errno.EROFS)
                if flags & os.O_TRUNC:  # ours to do: libfuse asks the kernel for that (FUSE_ATOMIC_O_TRUNC)
                    await image.resize(0)
                await refresh(image)
                keep_cache = not self._options.direct_io and node.mounted.cached.may_keep(image)
        except BaseException:
            node.mounted.release()
            raise
        fh = self._take_handle()
        direct = self._options.direct_io or bool(flags & os.O_DIRECT and self._direct_maps)
        sync = bool(flags & _SYNC_FLAGS) or (direct and "sync" in self._options.kernel)
        writes_directly = to_write and (direct or bool(flags & os.O_DIRECT))
        node.direct_writers += writes_directly
        self._handles[fh] = Handle(slot, node, writes=to_write, writes_directly=writes_directly, synced=sync)
        if self._fastpath:
            self._fastpath.attach(fh, slot, to_write=to_write, synced=sync)
        return _Opened(fh, direct, keep_cache)

    @_translated
    async def release(self, fh: int) -> None:
        if self._fastpath:
            self._fastpath.detach(fh)
        handle = self._handles.pop(fh)
        handle.node.direct_writers -= handle.writes_directly
        handle.node.mounted.release()

    @_translated
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        if inode == ROOT and self._tree.root is None:
            raise FUSEError(errno.EPERM)
        node = self._tree.node(inode)
        slot = await self._acquire(node, to_write=fields.update_size, by_name=fields.update_size and fh is None)
        try:
            async with slot as image:
                if node.mounted.read_only or (fields.update_size and not image.writable):
                    raise FUSEError(errno.EROFS)
                size = attr.st_size
                if fields.update_size and self.oversize and self.oversize.asks(node, image, size):
                    size = image.size
                elif fields.update_size:
                    await image.resize(size)
                if not self.settling:
                    change = partial(self._change_file, node, image, attr, fields, ctx)
                    if cast(FileStorage, image.storage).local:
                        change()
                    else:
                        await look(change)
                await refresh(image)
                entry = self._entry(node.id, attributes_of(node, image, self._options))
            if fields.update_size and (self.enable_writeback_cache or self._direct_maps):
                # The kernel drops from its cache what lies behind the size that it is told: with the image's, which is
                # rounded up, bytes that were cut off would stay there, and be written again.
                entry.st_size = size
                if not self.enable_writeback_cache:  # else it is the master of the size
                    entry.attr_timeout = 0
            return entry
        finally:
            node.mounted.release()

    def _change_file(
        self, node: Node, image: Image, attr: EntryAttributes, fields: SetattrFields, ctx: RequestContext
    ) -> None:
        fd = cast(FileStorage, image.storage).fileno()
        change_owner(
            fd,
            caller=ctx.uid,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            options=self._options,
        )
        mtime = attr.st_mtime_ns if fields.update_mtime else None
        if mtime is None or not self.times or not self.times.tells(node, mtime):
            change_times(fd, atime_ns=attr.st_atime_ns if fields.update_atime else None, mtime_ns=mtime)
        if mtime is not None and self.enable_writeback_cache:
            node.mounted.left.mtime_ns = mtime  # the kernel is the master of it
        if not image.writable:
            node.mounted.left.note(os.fstat(fd))

    @_translated
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        if inode == ROOT and self._tree.root is None:
            return self._entry(ROOT, directory_attributes(self._host, self._options))
        node = self._tree.node(inode)
        peek = None if node.mounted.opened else await self._tree.look(node)
        if self.times and node.direct_writers:
            self.times.update_soon(node)
        return self._entry(inode, await attributes_now(node, peek, options=self._options))

    @_translated
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Asked only where the kernel does not decide by owner and mode: the one who mounted it may do all there is."""
        if mode & os.W_OK and (await self.getattr(inode, ctx)).st_mode & 0o222 == 0:
            raise FUSEError(errno.EROFS)
        return not mode & os.X_OK or (inode == ROOT and self._tree.root is None)

    # -- the directory ------------------------------------------------------------------------------------------------

    @_translated
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        found = await self._tree.find(name)
        if found is None:
            raise FUSEError(errno.ENOENT)
        found.node.lookups += 1
        return self._entry(found.node.id, await attributes_now(found.node, found.peek, options=self._options))

    async def forget(self, inode_list: Any) -> None:
        for inode, lookups in inode_list:
            self._tree.forget(inode, lookups)

    @_translated
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        handle = self._take_handle()
        self._listings[handle] = await self._tree.entries()
        return handle

    @_translated
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        root = self._entry(ROOT, directory_attributes(self._host, self._options))
        for index, name in enumerate((b".", b"..")):
            if index >= start_id and not pyfuse3.readdir_reply(token, name, root, index + 1):
                return
        listing = self._listings[fh]
        for index in range(max(0, start_id - 2), len(listing)):
            name, node, peek = listing[index]
            entry = self._entry(node.id, await attributes_now(node, peek, fresh=False, options=self._options))
            if not pyfuse3.readdir_reply(token, name, entry, index + 3):
                return
            node.lookups += 1

    @_translated
    async def releasedir(self, fh: int) -> None:
        del self._listings[fh]

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """The directory is not ours to make durable."""

    async def _refuse(self, *args: Any) -> NoReturn:
        """Raw files come and go with their images."""
        raise FUSEError(errno.EPERM)

    create = mknod = mkdir = symlink = link = unlink = rmdir = rename = _refuse  # type: ignore[assignment]

    @_translated
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        space = await space_of(self._tree)
        result = StatvfsData()
        result.f_bsize, result.f_frsize, result.f_namemax = space.cluster_size, space.unit, space.longest_name
        result.f_blocks, result.f_bfree, result.f_bavail = space.blocks, space.free, space.available
        result.f_files, result.f_ffree, result.f_favail = len(self._tree.nodes), 0, 0
        return result

    # -- small parts --------------------------------------------------------------------------------------------------

    async def _acquire(self, node: Node, *, to_write: bool, by_name: bool = True) -> ImageSlot:
        """See `Tree.acquire`. Opening a broken image is EIO, and a line in the log."""
        try:
            slot = await self._tree.acquire(node, to_write=to_write, by_name=by_name)
        except Exception as error:
            code = self.complaints.errno_of(error, "open", broken=True)
            if code not in (errno.ESTALE, errno.EROFS):  # the kernel asks again; it can be opened
                self.unopened.note(node.mounted.path, error)
            raise FUSEError(code) from None
        self.unopened.forget(node.mounted.path)
        return slot

    def _entry(self, inode: int, attributes: Attributes) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = attributes.mode
        entry.st_nlink = attributes.nlink
        entry.st_uid = attributes.uid
        entry.st_gid = attributes.gid
        entry.st_size = attributes.size
        entry.st_blocks = attributes.blocks
        entry.st_atime_ns = attributes.atime_ns
        entry.st_mtime_ns = attributes.mtime_ns
        entry.st_ctime_ns = attributes.ctime_ns
        entry.attr_timeout = ATTRIBUTES_TIMEOUT
        entry.entry_timeout = self._names_timeout
        if self.settling:
            entry.attr_timeout = 0
            entry.st_uid = os.geteuid()
            entry.st_mode |= 0o600
        return entry

    @property
    def _direct_maps(self) -> bool:
        """See `FastPath.direct_maps`."""
        return self._fastpath is not None and self._fastpath.direct_maps

    def _take_handle(self) -> int:
        self._next_handle += 1
        return self._next_handle
