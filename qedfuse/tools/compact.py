"""Compacting an image: its file gets as short as what is in use, by moving the last clusters to where nothing is.

Whatever ends it, the image reads as before, and the next run goes on: `check/repair.py` has the rulebook. A cluster
with a place stays mapped, also where the host has a hole there: without its entry a backing file would show, and it
takes no space.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from qedfuse.chain.unfinished import claim_for_writing
from qedfuse.check.check import Repair, check_image
from qedfuse.check.result import CheckResult
from qedfuse.errors import CorruptError, QedfuseError
from qedfuse.host.closing import closing
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.image_lock import lock
from qedfuse.progress import Report
from qedfuse.qed.header_io import read_header
from qedfuse.qed.table_walk import Bounds


class Compaction(NamedTuple):
    """What has come of it; bytes. `size`: how long the file is; `held`: what it takes on the host, which is not known
    before it is done (None)."""

    size_before: int
    size_after: int
    held_before: int
    held_after: int | None


async def compact_image(path: str, *, dry_run: bool = False, progress: Report | None = None) -> Compaction:
    """Compact the image at `path`; durable on return. `dry_run`: write nothing, and tell what would come of it.

    `progress` as for `check.check_image`, and memory, too. Raises CorruptError, with nothing changed, if the tables are
    not in order; InUseError, QedfuseError, OSError. After an error or cancellation the image reads as before.
    """
    async with closing(FileStorage.open(path, not dry_run)) as storage:
        if dry_run:
            lock(storage.fileno(), path, writable=False)
        else:
            claim_for_writing(storage.fileno(), path)
        header = await read_header(storage)
        if storage.fixed:
            raise QedfuseError(path, "is a block device, which does not get shorter", errno.EINVAL)
        size, held = storage.size(), _held(storage)
        repair = Repair.NONE if dry_run else Repair.COMPACT
        result = await check_image(storage, header, repair=repair, progress=progress)
        if result.check_errors:
            raise CorruptError(path, f"cannot be compacted: {result.problems[0]}")
        if result.corruptions:
            raise CorruptError(path, f"is corrupt ({result.problems[0]}): repair it first, with 'qedfuse check -r all'")
        if dry_run:
            return Compaction(size, min(size, _size_after(result, size)), held, None)
        return Compaction(size, storage.size(), held, _held(storage))


def _held(storage: FileStorage) -> int:
    return storage.stat().st_blocks * 512


def _size_after(result: CheckResult, size: int) -> int:
    """Of the file, `size` bytes now: the header, and what is in use."""
    clusters = Bounds.of(result.header, size).end // result.header.cluster_size
    return (clusters - result.leaks - result.past_end_clusters) * result.header.cluster_size
