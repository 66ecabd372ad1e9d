"""The life of a mount: open the images, mount, say so, serve, and take all of it down again.

It ends when it is unmounted (umount, fusermount3 -u, qedfuse umount). SIGTERM, SIGINT and SIGHUP unmount it themselves.
If it is in use then (an open file, a loop device), the mount leaves its place at once, what was completed is made
durable, and the daemon serves those users to their last close: their data is worth more than a quick exit. A second
signal ends it there and then, and they get errors. However it ends, every image is flushed and closed, and only then
does `qedfuse umount` return and the process exit.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from qedfuse.daemon.background import make_room
from qedfuse.daemon.config import MountConfig
from qedfuse.daemon.control_server import ControlServer
from qedfuse.daemon.dirty_limit import become_flusher, fit_options, set_dirty_limit
from qedfuse.daemon.images import MountImages
from qedfuse.daemon.kernel_times import Clocks
from qedfuse.daemon.launch import Link
from qedfuse.daemon.memory_limit import memory_limit
from qedfuse.daemon.status_report import report
from qedfuse.errors import EXIT_FAILED, EXIT_OK, QedfuseError, leaves
from qedfuse.fuse import session
from qedfuse.fuse.all_images import Hurry, close_all, flush_all
from qedfuse.fuse.complaints import Complaints
from qedfuse.fuse.connection import abort
from qedfuse.fuse.kernel import cache_survives_direct_writes
from qedfuse.fuse.node import Node
from qedfuse.fuse.operations import Operations
from qedfuse.fuse.oversize import Oversize
from qedfuse.fuse.tree import Tree
from qedfuse.host.limits import most_requests, raise_limits
from qedfuse.host.lookups import NoAnswerError, look
from qedfuse.host.mountinfo import Mount, find_mount
from qedfuse.host.signals import ending_signals
from qedfuse.host.unmount import unmount
from qedfuse.text import describe

if TYPE_CHECKING:
    from qedfuse.fuse.fastpath import FastPath

#: Seconds that the kernel has to tell us that it has unmounted us.
_GRACE = 5.0
#: Seconds that requests have to come to an end when users are not waited for any longer.
_MOMENT = 2.0

_log = logging.getLogger("qedfuse")


class Daemon:
    """One mount, from its first image opened to its last one closed. `link`, if any, is told when it is usable;
    `flusher`: see `become_flusher`."""

    def __init__(self, config: MountConfig, link: Link | None, *, flusher: bool) -> None:
        self._flusher = flusher
        self._memory_limit = memory_limit()
        self._config = config
        self._options = config.options
        self._link = link
        self._control = ControlServer({"status": lambda _call: self.status(), "flush": lambda _call: self.flush()})
        self._starting = trio.CancelScope()
        self._ended = trio.Event()
        self._stopping = False
        self._killed = False
        self._aborted = False
        self._hurry = Hurry()
        self._session = False
        self._serving = False
        self._tree = Tree()
        self._operations: Operations | None = None
        self._fastpath: FastPath | None = None
        self._mount: Mount | None = None

    async def run(self) -> int:
        """Returns the exit code: 0 if nothing was lost. Raises OSError if it did not come to a usable mount."""
        wanted = ending_signals()
        for number in wanted:  # from the last one served to the end of the process, which may take a moment
            signal.signal(number, signal.SIG_IGN)
        with trio.open_signal_receiver(*wanted) as signals:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._watch, signals, nursery)
                try:
                    await self._start(nursery)
                    await self._ended.wait()
                finally:
                    with trio.CancelScope(shield=True):
                        error = await self._take_down()
                    if self._aborted:  # what waits for the host can be neither ended nor waited for
                        logging.shutdown()
                        os._exit(EXIT_FAILED)
                    nursery.cancel_scope.cancel()
        return EXIT_OK if error is None else EXIT_FAILED

    # -- up -----------------------------------------------------------------------------------------------------------

    async def _start(self, nursery: trio.Nursery) -> None:
        with self._starting:
            await self._open_images(nursery)
            await self._mount_tree(nursery)
        if self._starting.cancelled_caught:
            how = "the kernel has ended it" if self._ended.is_set() else "interrupted"
            raise QedfuseError(self._config.mountpoint, f"{how} before it was mounted")
        _log.info("%s: mounted on %s", ", ".join(self._config.sources), self._config.mountpoint)
        if self._link:
            self._link.report_ready()
        if len(self._config.sources) > 1 and self._config.directories:
            nursery.start_soon(self._look_for_hidden)

    async def _look_for_hidden(self) -> None:
        """Two sources can have the same name: say so now, not only when the directory is listed."""
        try:
            await self._tree.entries()
        except Exception as error:
            Complaints().errno_of(error, "listing")

    async def _open_images(self, nursery: trio.Nursery) -> None:
        images = MountImages(self._config, self._options, nursery)
        self._tree = images.tree
        if not await images.open_named():
            self._options = replace(self._options, read_only=True)

    async def _mount_tree(self, nursery: trio.Nursery) -> None:
        mountpoint = self._config.mountpoint
        self._options = fit_options(self._options, self._memory_limit, flusher=self._flusher)
        self._fastpath = self._load_fastpath()
        self._operations = Operations(self._tree, self._options, os.stat(mountpoint), self._fastpath)
        session.mount(self._operations, mountpoint, self._config.sources[0], self._options)
        self._session = True
        self._serving = True
        nursery.start_soon(self._serve_kernel)
        self._mount = find_mount(mountpoint)
        if self._mount is None:
            raise QedfuseError(mountpoint, "mounted, but not to be seen here")
        set_dirty_limit(self._mount.device, self._memory_limit)
        nursery.start_soon(make_room, self._mount.device)
        await self._control.listen(self._mount.device)
        nursery.start_soon(self._control.serve)
        if self._options.writeback:
            self._operations.oversize = Oversize(nursery, self._path_of, self._mount.st_dev, session.drop_pages)
        await self._settle(self._operations, self._mount, nursery)
        if self._fastpath and not self._fastpath.bound:
            _log.warning("no native fast path (requests do not come by it): all is answered in Python")
            self._fastpath = None

    def _load_fastpath(self) -> FastPath | None:
        if not self._config.fastpath:
            return None
        try:
            from qedfuse.fuse.fastpath import FastPath

            # See dirty_limit.py: no pages that could not be written.
            maps = cache_survives_direct_writes(os.uname().release) and (self._memory_limit is None or self._flusher)
            options = self._options
            return FastPath(session.library(), cached=not options.direct_io, writeback=options.writeback, maps=maps)
        except (ImportError, OSError) as error:
            _log.warning("no native fast path (%s): all is answered in Python", error)
            return None

    def _path_of(self, node: Node) -> bytes:
        point = os.fsencode(self._config.mountpoint)
        return point if node is self._tree.root else os.path.join(point, node.name)

    async def _settle(self, operations: Operations, mount: Mount, nursery: trio.Nursery) -> None:
        """Wait until the kernel uses the mount, and tell it what it does not ask for."""
        await operations.initialized.wait()
        root = self._tree.root
        times = Clocks(nursery, self._path_of, mount.st_dev, lambda: operations.counts.totals()["write"])
        if root is not None and root.mounted.opened is not None:
            # In a thread: its place may be locked by an early reader.
            await trio.to_thread.run_sync(session.tell_root_size, root.mounted.opened.size)
            if self._options.writeback:
                await times.start(root)
        if self._options.writeback:
            operations.times = times
        operations.settling = False

    async def _serve_kernel(self) -> None:
        try:
            assert self._operations is not None
            async with self._fastpath.serving(self._operations.answer_open) if self._fastpath else nullcontext():
                await session.serve(most_requests())
        except Exception as error:
            # ECONNABORTED: a process has ended the connection; or the mount, while the kernel handed a request out.
            if all(isinstance(leaf, ConnectionAbortedError) for leaf in leaves(error)):
                _log.info("%s: the kernel has ended the connection", self._config.mountpoint)
            else:
                _log.error("%s: serving the kernel failed", self._config.mountpoint, exc_info=error)
        finally:
            self._ended.set()
            self._starting.cancel()

    # -- down ---------------------------------------------------------------------------------------------------------

    async def _watch(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if self._mount is None or (self._operations and self._operations.settling):
                self._starting.cancel()
            elif self._ended.is_set():
                _log.warning("%s: %s, closing without another try", self._config.mountpoint, name)
                if self._hurry.killed.is_set():
                    self._hurry.now.set()
                self._give_up()
            elif not self._stopping:
                _log.info("%s: %s, unmounting", self._config.mountpoint, name)
                self._stopping = True
                nursery.start_soon(self._leave)
            else:
                _log.warning("%s: %s again, stopping at once", self._config.mountpoint, name)
                if self._killed:
                    self._hurry.now.set()
                else:
                    self._killed = True
                    session.terminate()
                    nursery.start_soon(self._force)
                self._give_up()

    def _give_up(self) -> None:
        self._hurry.killed.set()
        for node in self._tree.nodes:
            node.mounted.give_up()

    async def _force(self) -> None:
        """End the mount although requests wait for something that may never come."""
        with trio.move_on_after(_MOMENT):
            await self._ended.wait()
            return
        assert self._mount is not None
        _log.error("%s: requests wait for a host that does not answer: they get errors", self._config.mountpoint)
        self._aborted = True
        try:
            await look(partial(abort, self._config.mountpoint, self._mount.device))
        except OSError as error:
            _log.error("%s", describe(error, self._config.mountpoint))
        self._ended.set()

    async def _leave(self) -> None:
        """Unmount; if it is in use, go on for its users."""
        if await self._try_unmount(lazy=False):
            with trio.move_on_after(_GRACE):
                await self._ended.wait()
                return
        else:
            await self._try_unmount(lazy=True)
        _log.warning(
            "%s: in use, perhaps in another mount namespace; serving until that ends (a second signal stops at once)",
            self._config.mountpoint,
        )
        await self.flush()

    async def _try_unmount(self, *, lazy: bool, serving: bool = True) -> bool:
        """Take our mount away, if it is still there and on top. False: it is in use, or that cannot be found out.
        `serving`: the kernel may wait for us meanwhile, so that it takes a thread."""
        try:
            here = find_mount(self._config.mountpoint)
            if here is None or self._mount is None or here.device != self._mount.device:
                return False
            if serving:
                await trio.to_thread.run_sync(lambda: unmount(self._config.mountpoint, lazy=lazy))
            else:
                unmount(self._config.mountpoint, lazy=lazy)
        except OSError as error:
            if error.errno != errno.EBUSY:
                _log.error("%s", describe(error))
            return False
        except RuntimeError as error:  # no thread to be had
            _log.error("%s: cannot unmount: %s", self._config.mountpoint, error)
            return False
        return True

    async def _take_down(self) -> str | None:
        """Leave nothing behind. Returns what went wrong."""
        if self._session:
            if self._serving and not self._ended.is_set():  # it did not come to a usable mount
                session.terminate()
                await self._ended.wait()
            await self._try_unmount(lazy=True)
            if not self._aborted:  # else requests refer to it
                session.close(unmount=self._mount is None)
        self._control.stop_listening()
        if self._mount is not None:
            _log.info("%s: unmounted, closing", self._config.mountpoint)
        problems = ["it was still in use when it was stopped"] if self._killed else []
        images = [node.mounted for node in self._tree.nodes]
        for image in await close_all(images, self._hurry, self._control.dismiss):
            self._aborted = True
            problems.append(f"{describe(NoAnswerError(image.path))}: not closed, and locked until it does")
        problems += [describe(image.failure, image.path) for image in images if image.failure is not None]
        if self._session:
            # If there were no descriptors left to find it, or no thread.
            await self._try_unmount(lazy=True, serving=False)
        error = "; ".join(problems) or None
        if self._mount is not None:
            _log.info("%s: closed%s", self._config.mountpoint, f", but {error}" if error else "")
        await self._control.finish(error)
        return error

    # -- what it is doing ---------------------------------------------------------------------------------------------

    async def flush(self) -> dict[str, Any]:
        """Make durable what was completed, in every open image. "unwritten": what cannot be, but may be later."""
        problems, unwritten = await flush_all([node.mounted for node in self._tree.nodes], self._nursery)
        return {"error": "; ".join(problems) or None, "unwritten": "; ".join(unwritten) or None}

    async def status(self) -> dict[str, Any]:
        """For `qedfuse status`."""
        assert self._operations is not None  # there are no clients before
        return report(self._config, self._options, self._tree, self._operations, self._fastpath)


def serve(config: MountConfig, link: Link | None = None) -> int:
    """Mount and serve until the end, in this process. `link`: to the process that waits for the mount, if it is
    not in the foreground. Returns the exit code; raises what `Daemon.run` raises."""
    flusher = become_flusher()  # before there is another thread
    if (limit := raise_limits()) is not None:
        _log.warning("no file can grow beyond %d bytes here (ulimit -Hf): writes that need more fail", limit)
    return trio.run(Daemon(config, link, flusher=flusher).run)
