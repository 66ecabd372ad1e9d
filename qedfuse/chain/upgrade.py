"""From an image, or a raw file, that is open for reading to one that is open for writing, under its users."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import trio

from qedfuse.chain.recovery import recover
from qedfuse.chain.unfinished import refuse_unfinished
from qedfuse.errors import InUseError
from qedfuse.host import image_lock
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.image_lock import add_writers_locks, drop_writers_locks, share_writers_locks
from qedfuse.host.lookups import enter, look
from qedfuse.host.remote_file import RemoteFile, isolate
from qedfuse.qed.header import FEATURE_NEED_CHECK, Header
from qedfuse.qed.header_io import read_header
from qedfuse.qed.image import Image


async def make_writable(image: Image) -> None:
    """Open for writing what `open_for_use` has opened for reading only, for all its users, which go on meanwhile.

    From a reader's locks to a writer's, a check if the image was not closed cleanly. Not to be called twice at a time.
    Raises as `open_for_use` does, InUseError if another process reads the image, too; the image is then as it was.
    """
    readers = image.storage
    assert isinstance(readers, FileStorage)
    storage = await look(partial(_claim, readers), discard=partial(_unclaim, readers))
    try:
        header = await read_header(storage)
        if _kind_of(header) != _kind_of(image.header):
            raise InUseError(image.path, "was changed by another process while it was read here")
        header = await recover(storage, header)
        await image.begin_writing(header, partial(readers.become, storage))
    except BaseException:
        with trio.CancelScope(shield=True):
            with suppress(OSError):
                await look(partial(_give_locks_back, readers))
            with suppress(OSError):
                await storage.close()
        raise


async def make_file_writable(readers: FileStorage) -> None:
    """The same for a raw file, of which nothing need be checked. Raises as `make_writable` does."""
    readers.become(await look(partial(_claim, readers), discard=partial(_unclaim, readers)))


def _kind_of(header: Header) -> Header:
    """All of a header that `recover` does not change."""
    return header.with_feature(FEATURE_NEED_CHECK, False).with_known_autoclear()


def _claim(readers: FileStorage) -> FileStorage:
    """A second opening of a file, with a writer's locks. Blocks."""
    if isinstance(readers, RemoteFile):
        enter(readers.mount)
    storage = FileStorage.open(readers.path, True, pin=readers.fileno())  # before the locks: it may not be allowed
    try:
        add_writers_locks(readers.fileno(), readers.path)
        share_writers_locks(storage.fileno())
        refuse_unfinished(storage.fileno(), readers.path)
        return storage if readers.local else isolate(storage)
    except BaseException:
        _unclaim(readers, storage)
        raise


def _unclaim(readers: FileStorage, storage: FileStorage) -> None:
    """`_claim` undone, as far as it came."""
    with suppress(OSError):  # nothing was written
        image_lock.close(storage.fileno())
    _give_locks_back(readers)


def _give_locks_back(readers: FileStorage) -> None:
    with suppress(OSError, ValueError):  # this file system has no locks, or it was closed meanwhile
        drop_writers_locks(readers.fileno())
