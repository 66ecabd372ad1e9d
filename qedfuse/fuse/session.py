"""The session with the kernel, by pyfuse3: mounted, served, ended. One a process, as pyfuse3 has it.

Source: fuse(8), libfuse lib/mount.c; pyfuse3's documentation.
"""

from __future__ import annotations

import os

import pyfuse3

from qedfuse.errors import QedfuseError
from qedfuse.fuse.connection import fuse_descriptors
from qedfuse.fuse.libfuse import captured_stderr, option_words
from qedfuse.fuse.options import MountOptions
from qedfuse.host.offload import watch


def mount(operations: pyfuse3.Operations, mountpoint: str, source: str, options: MountOptions) -> None:
    """Mount. Requests may wait from now on. Raises QedfuseError with libfuse's reason."""
    with captured_stderr() as complaints:
        try:
            pyfuse3.init(operations, mountpoint, option_words(source, options))
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
    """Make the kernel believe in the size (bytes) of a file mount's root, which it takes to be 0: see
    `kernel_times.py`.

    A byte that is put into its cache extends the file. The page that it is in counts as incomplete, and is read as
    ever. To be called when the connection is initialized, and before the mount is used, in a thread while requests are
    answered. Source: fuse(4), FUSE_NOTIFY_STORE; Linux fs/fuse/dev.c.
    """
    if size:
        pyfuse3.notify_store(pyfuse3.ROOT_INODE, size - 1, b"\0")
