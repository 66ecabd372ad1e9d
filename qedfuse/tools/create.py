"""`qedfuse create`: a new image in a host file, over whatever file is there unless it is in use.

What goes into the file, and in which order, is decided in `new_image.py`.
"""

from __future__ import annotations

import errno
import os

from qedfuse.chain.chain import open_backing
from qedfuse.chain.unfinished import claim_for_writing
from qedfuse.errors import QedfuseError, UsageError
from qedfuse.host.closing import closing
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.new_file import NewFile
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import (
    Header,
)
from qedfuse.qed.new_image import new_header, write_image


async def create_image(
    path: str,
    size: int | None = None,
    *,
    geometry: Geometry | None = None,
    backing: str | None = None,
    backing_format: str | None = None,
) -> tuple[Header, str | None]:
    """Create an image at `path`, over whatever file is there unless it is in use; durable on return.

    `size` in bytes is rounded up to 512; without it, it is the backing file's. `backing` is stored as it is, and a
    relative name is relative to the new image's directory. `backing_format` is raw, qed or qcow2; without it, it is
    probed, once: a raw file is marked so, and never probed again.

    Returns the new header and the backing file's format. Raises UsageError, InUseError (a process has the file open),
    QedfuseError, OSError; nothing is touched before the arguments have been checked.
    """
    geometry = geometry or Geometry()
    if backing is None:
        if size is None:
            raise UsageError(path, "a size is needed (or a backing file to take it from)")
        header = new_header(path, size, geometry)
    else:
        below, backing_format = await _look_at_backing(path, backing, backing_format)
        is_raw = backing_format == "raw"
        header = new_header(
            path, below if size is None else size, geometry, os.fsencode(backing), backing_is_raw=is_raw
        )
    await _write_file(path, header, os.fsencode(backing or ""))
    return header, backing_format


async def _write_file(path: str, header: Header, backing_name: bytes) -> None:
    """`write_image` on a host file, new or not. A new one is gone again if that fails."""
    try:
        with NewFile(path) as new:
            async with closing(FileStorage.open(path, writable=True)) as storage:
                if storage.fixed:
                    what = "is a block device, and a new qed image must be a regular file"
                    raise QedfuseError(path, what, errno.EINVAL)
                claim_for_writing(storage.fileno(), path)
                await write_image(storage, header, backing_name)
                await new.make_durable()
    except OSError as error:
        error.filename = error.filename or path  # a full disk has none
        raise


async def _look_at_backing(path: str, backing: str, backing_format: str | None) -> tuple[int, str]:
    """The size and format of the backing file, which must be there; neither it nor one below it may be the new image.

    Nothing is locked: only the headers are read.
    """
    if not backing:
        raise UsageError(path, "the backing file's name is empty")
    async with closing(await open_backing(path, backing, backing_format, share=True)) as layer:
        return layer.size, layer.format
