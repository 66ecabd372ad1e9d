"""What is written into a file that is gone is gone, too: an orphan is an open image whose file has been replaced.

Moving another image over it (rename(2)) leaves the open one without a name. It can be read and written as before, but
what is written can never be found, and so no sync of it succeeds. A file that was only deleted is its users' own
affair, and one that has another name keeps what is written.
"""

from __future__ import annotations

import errno
import os
from functools import partial

from qedfuse.host.file_id import FileId
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.lookups import cannot_tell, look
from qedfuse.host.storage import ReadStorage
from qedfuse.qed.image import Image

_DELETED = " (deleted)"


def may_be_orphaned(image: Image) -> bool:
    """Whether its file has no name any more. Costs one fstat."""
    return image.storage.stat().st_nlink == 0


async def check_not_orphaned(image: Image) -> None:
    """Raises OSError: ESTALE if the image's file has no name any more, and its old one is another file's; another one
    if that cannot be told."""
    if may_be_orphaned(image) and await look(partial(_is_orphaned, image.storage)):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def _is_orphaned(storage: ReadStorage) -> bool:
    return any(_is_another(path, storage) for path in {storage.path, _last_name(storage)})


def _is_another(path: str, storage: ReadStorage) -> bool:
    try:
        return FileId.at(path) != FileId.of(storage.stat())
    except OSError as error:
        if cannot_tell(error):
            raise
        return False


def _last_name(storage: ReadStorage) -> str:
    """It may have been renamed since it was opened. Source: proc(5) on /proc/pid/fd."""
    if not isinstance(storage, FileStorage):
        return storage.path
    try:
        return os.readlink(f"/proc/self/fd/{storage.fileno()}").removesuffix(_DELETED)
    except OSError as error:
        if cannot_tell(error):
            raise
        return storage.path
