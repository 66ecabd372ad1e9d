"""The session with the kernel, by pyfuse3: mounted, served, ended. One a process, as pyfuse3 has it.

Source: fuse(8), libfuse lib/mount.c; pyfuse3's documentation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyfuse3

from qedfuse.errors import QedfuseError
from qedfuse.fuse.connection import fuse_descriptors
from qedfuse.fuse.options import MountOptions
from qedfuse.host.mountinfo import SUBTYPE
from qedfuse.host.offload import watch


class _Option(str):
    """A mount option in any bytes: pyfuse3 would encode it as ASCII."""

    __slots__ = ()

    def encode(self, encoding: str = "", errors: str = "") -> bytes:
        return str.encode(self, sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


def mount(operations: pyfuse3.Operations, mountpoint: str, source: str, options: MountOptions) -> None:
    """Mount. Requests may wait from now on. Raises QedfuseError with libfuse's reason."""
    words = {f"subtype={SUBTYPE}", _Option("fsname=" + _escape(source)), *options.kernel}
    if options.read_only:
        words.add("ro")
    if options.allow_other:
        words.add("allow_other")
    if options.checks_permissions:
        words.add("default_permissions")
    with _captured_stderr() as complaints:
        try:
            pyfuse3.init(operations, mountpoint, words)
        except RuntimeError as error:
            if "mount" in str(error):  # there is a session: pyfuse3 has no other way to tell
                pyfuse3.close(unmount=False)
            lines = os.fsdecode(complaints()).strip().splitlines()
            reason = lines[0] if lines else "libfuse gives no reason"
            raise QedfuseError(mountpoint, f"cannot mount: {reason}") from None
    for fd in fuse_descriptors():
        watch(fd)


async def serve(max_tasks: int) -> None:
    """Answer the kernel's requests, up to `max_tasks` at once, until it has ended the mount or `terminate` is called.

    Raises what pyfuse3 raises: ConnectionAbortedError, perhaps in a group, when the connection was ended by force.
    """
    await pyfuse3.main(max_tasks=max_tasks)


def terminate() -> None:
    """Have `serve` return, though the mount is still there."""
    pyfuse3.terminate()


def close(*, unmount: bool) -> None:
    """Give the session's memory and descriptor back. No request may be under way. `unmount`: by libfuse, as well."""
    pyfuse3.close(unmount=unmount)


def drop_pages(inode: int) -> None:
    """Have the kernel write what it has of an inode, and forget it. Blocks until the writes are answered. Raises
    OSError. Source: linux/fuse.h, FUSE_NOTIFY_INVAL_INODE."""
    pyfuse3.invalidate_inode(inode)


def library() -> str:
    """pyfuse3's shared library, which is bound to the libfuse in use."""
    return pyfuse3.__file__


def tell_root_size(size: int) -> None:
    """Make the kernel believe in the size (bytes) of a file mount's root, which it takes to be 0; see `root_times.py`.

    A byte that is put into its cache extends the file. The page that it is in counts as incomplete, and is read as
    ever. To be called when the connection is initialized, and before the mount is used, in a thread while requests are
    answered. Source: fuse(4), FUSE_NOTIFY_STORE; Linux fs/fuse/dev.c.
    """
    if size:
        pyfuse3.notify_store(pyfuse3.ROOT_INODE, size - 1, b"\0")


def _escape(source: str) -> str:
    """libfuse splits options at commas and takes a backslash for an escape."""
    return source.replace("\\", "\\\\").replace(",", "\\,")


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], bytes]]:
    """What libfuse and fusermount3 print: the call returns it. What the pipe does not hold is lost: nothing waits."""
    if sys.stderr is not None:
        sys.stderr.flush()
    saved = os.dup(2)
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def read() -> bytes:
        try:
            return os.read(reader, 65536)
        except BlockingIOError:
            return b""

    try:
        os.dup2(writer, 2)
        yield read
    finally:
        os.dup2(saved, 2)
        for fd in (saved, reader, writer):
            os.close(fd)
