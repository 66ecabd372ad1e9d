"""Which of the mounts that are to be seen here has a file open, as an image or below one.

Their daemons are asked, and know files by their ids: what names led to them when they were opened does not matter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from qedfuse.daemon.control import Client
from qedfuse.errors import QedfuseError
from qedfuse.host.file_id import FileId
from qedfuse.host.mountinfo import Mount, read_mounts

#: Seconds that one daemon, and all of them, have for an answer. One that is well takes a few milliseconds.
_PATIENCE = 2.0
_PATIENCE_FOR_ALL = 5.0


class Serving(NamedTuple):
    """A mount that has the file open. `pid`: its daemon's. `as_backing`: only below its images."""

    mountpoint: str
    pid: int
    as_backing: bool


def find_serving(file: FileId) -> Serving | None:
    """The mount that has `file` open, if there is one and its daemon says so in time. Raises OSError, ValueError if the
    kernel's table of mounts cannot be read."""
    mounts = {mount.device: mount for mount in reversed(read_mounts()) if mount.is_qedfuse}
    deadline = time.monotonic() + _PATIENCE_FOR_ALL
    for mount in mounts.values():
        seconds = min(_PATIENCE, deadline - time.monotonic())
        if seconds <= 0:
            break
        try:
            with Client(mount, seconds) as client:
                found = _look(mount, client.ask("status", seconds), file)
        except QedfuseError:  # another user's, or it is busy
            continue
        if found is not None:
            return found
    return None


def _look(mount: Mount, answer: Mapping[str, Any], file: FileId) -> Serving | None:
    wanted = file._asdict()
    for image in answer["images"]:
        files = image.get("files", ())  # a daemon that is older does not tell
        if wanted in files:
            return Serving(mount.mountpoint, answer["pid"], as_backing=files[0] != wanted)
    return None
