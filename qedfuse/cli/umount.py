"""`qedfuse umount`."""

from __future__ import annotations

import errno
import os

import click

from qedfuse.cli.params import file_name
from qedfuse.daemon.control import Client
from qedfuse.errors import EXIT_FAILED, EXIT_OK, QedfuseError
from qedfuse.host.mountinfo import Mount, find_mount, read_mounts
from qedfuse.host.unmount import unmount

#: Seconds that the kernel has to tell the daemon.
_GRACE = 5.0


@click.command(
    epilog=f"Exit codes: {EXIT_OK} unmounted, flushed and closed, {EXIT_FAILED} in use, not mounted, or data was lost."
)
@click.argument("mountpoint", type=file_name)
def umount(mountpoint: str) -> int:
    """Unmount MOUNTPOINT, and wait until the images are flushed and closed.

    It stays mounted if something that was written cannot be kept, for want of space on the host: it would be lost.
    """
    mount = find_qedfuse_mount(mountpoint)
    try:
        client = Client(mount)
    except QedfuseError as error:
        unmount(mount.mountpoint)
        raise QedfuseError(mountpoint, f"unmounted, but {error.message}: cannot tell whether all is flushed") from None
    with client:
        client.ask("wait")
        _check_that_all_is_written(mount, mountpoint)
        others = _others(mount)
        unmount(mount.mountpoint)
        elsewhere = [point for id, point in _others(mount).items() if id in others]
        answer = client.wait(_GRACE if not elsewhere else 0)
        if answer is None:
            _check_that_it_ends(mount, mountpoint, elsewhere)
            answer = client.wait()
    assert answer is not None
    problem = answer.get("error")
    if not answer.get("closed"):
        raise QedfuseError(mountpoint, f"unmounted, but not all is safe yet: {problem}; its daemon goes on trying")
    if problem is not None:
        raise QedfuseError(mountpoint, f"unmounted, but not all is safe: {problem}")
    return EXIT_OK


def _check_that_all_is_written(mount: Mount, mountpoint: str) -> None:
    """Raises QedfuseError if the daemon, which answers, has what it cannot write. What the kernel had it has handed out
    when the last user closed the file, and as long as there are users nothing can be unmounted."""
    with Client(mount) as client:
        problem = client.ask("flush", None).get("unwritten")
    if problem is not None:
        raise QedfuseError(mountpoint, f"not unmounted: {problem}: mend that (free space) and try again", errno.EBUSY)


def _others(mount: Mount) -> dict[int, str]:
    """Bind mounts of a mount: mountpoints by mount id."""
    return {
        other.id: other.mountpoint for other in read_mounts() if other.device == mount.device and other.id != mount.id
    }


def _check_that_it_ends(mount: Mount, mountpoint: str, elsewhere: list[str]) -> None:
    """The daemon may be closing the images still, or the kernel has not let it go. Raises QedfuseError if so."""
    try:
        client = Client(mount)
    except QedfuseError:
        return  # it does not listen any more: it is closing
    with client:
        problem = client.ask("flush", None)["error"]
    state = "all is flushed" if problem is None else problem
    where = f"on {', '.join(elsewhere)}" if elsewhere else "in another mount namespace"
    raise QedfuseError(
        mountpoint,
        f"unmounted here, but still mounted {where}; {state}, but the image stays in use until it is unmounted there",
        errno.EBUSY,
    )


def find_qedfuse_mount(mountpoint: str) -> Mount:
    """The qedfuse mount at this path. Raises QedfuseError if there is none."""
    mount = find_mount(os.path.realpath(mountpoint))
    if mount is None or not mount.is_qedfuse:
        raise QedfuseError(mountpoint, "is not a qedfuse mount", errno.EINVAL)
    return mount
