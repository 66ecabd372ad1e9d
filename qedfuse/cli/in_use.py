"""What a command says of an image that is in use: if one of our mounts has it, which one, and how to get it back."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from qedfuse.errors import InUseError


@contextmanager
def name_mount() -> Iterator[None]:
    """Around the work of a command: where an image is in use by one of our mounts, the error names it and the way out.

    That is so for its backing files, too. A mount whose daemon does not answer soon, or not to this user, is not named:
    the error stays what it was.
    """
    try:
        yield
    except InUseError as error:
        message = _name_mount(error.path)
        if message is None:
            raise
        raise error.reworded(message) from None


@contextmanager
def share_hint(*, target: str | None = None) -> Iterator[None]:
    """As `name_mount`, and say how to look at an image in use; not of `target`, which is to be written."""
    try:
        with name_mount():
            yield
    except InUseError as error:
        if error.path == target:
            raise
        raise error.reworded(f"{error.message}, or use -U to look at it anyway") from None


def _name_mount(path: str) -> str | None:
    from qedfuse.daemon.serving import find_serving
    from qedfuse.host.file_id import FileId

    try:
        serving = find_serving(FileId.at(path))
    except OSError:  # it has another name by now
        return None
    if serving is None:
        return None
    what = "is the backing file of an image that is" if serving.as_backing else "is"
    point = serving.mountpoint
    command = f"qedfuse umount {shlex.quote(point)}"
    return f"{what} mounted on {point} (pid {serving.pid}): unmount it first, with '{command}'"
