"""What opening an image for writing may do to it, before anything else: nothing that could be read is dropped.

The rule
========

A reference (the L1 entry of a table, the L2 entry of a cluster) is

    inside     if the file has all of its target. What the file's last sector of 512 bytes lacks counts as there, and is
               zeroes: that is how QEMU counts
    cut off    if its target begins inside the file and ends behind it, by a sector or more
    outside    if its target begins behind the end
    wrong      if it is not aligned, or leads into the header

Only what is inside can be read: QEMU says EINVAL to the rest, and we EIO. On the way to a writable image:

- *closed cleanly*: it has no other references, unless it was damaged, and then each reader of them is told, until the
  file has grown over them: to look for them would read all tables. There is one exception. A file that ends in a part
  of a cluster grows with the first allocation, and what was cut off would read as half zeroes from then on. So such a
  file is checked; if something is cut off, or if that cannot be told, it is refused, and `check` decides.
- *not closed cleanly, without a backing file*: this is what a crash leaves. A reference outside the file was made after
  the last sync, and so was its target: it becomes 0, and reads as zeroes, as before. So does one that is wrong, as in
  QEMU. One that is cut off was under way: the file grows, what is there of it stays, and the rest reads as zeroes.
- *not closed cleanly, over a backing file*: no crash leaves anything but references inside, as their targets are
  durable before they are (commit.py), in QEMU, too. Others are damage, and without them the backing file's old bytes
  would show: such an image is refused, and `check -r all` decides. So it is on a block device, whose end is where it
  was before the crash.

Double references keep their data each, by a copy (repair.py). What nothing refers to is deallocated. Autoclear bits
that we do not know are cleared: what they vouch for is about to change.

Read-only, nothing is written, and the same rule says what is seen: without a backing file, what is outside or wrong in
an unclean image reads as zeroes; everything else that is not inside is an error.
"""

from __future__ import annotations

import logging

from qedfuse.check.check import Repair, check_image
from qedfuse.check.result import CheckResult
from qedfuse.errors import CorruptError
from qedfuse.host.storage import Storage, size_in_sectors
from qedfuse.qed.header import Header
from qedfuse.qed.header_io import write_header

_log = logging.getLogger("qedfuse")


async def recover(storage: Storage, header: Header) -> Header:
    """Make an image fit to be opened for writing, by the rule. Returns the header that is in the file then.

    Raises CorruptError, with nothing changed, if it has to be checked by hand first; OSError. Cancellation is harmless.
    """
    if header.needs_check:
        header = await _repair(storage, header)
    if not storage.fixed:
        await _complete_end(storage, header)
    if header != header.with_known_autoclear():
        header = header.with_known_autoclear()
        await write_header(storage, header)
    return header


async def _complete_end(storage: Storage, header: Header) -> None:
    """See to it that no cluster in use is cut off by the file's end. Raises CorruptError."""
    size = size_in_sectors(storage)
    if size % header.cluster_size:
        found = await check_image(storage, header)
        if found.cut_end:
            raise CorruptError(
                storage.path,
                f"the file is cut off inside of what is in use ({storage.size()} bytes, it should have at least "
                f"{found.cut_end}); copy out what can be read, or drop it with `qedfuse check -r all`",
            )
        if found.tables_not_followed or found.check_errors:
            raise CorruptError(
                storage.path, "the file ends inside a cluster, and its tables do not tell whose; see `qedfuse check`"
            )
    elif storage.size() < size:
        await storage.truncate(size)


async def _repair(storage: Storage, header: Header) -> Header:
    """Make an image consistent that was not closed cleanly."""
    path = storage.path
    _log.warning("%s: was not closed cleanly; checking it", path)
    if header.has_backing_file or storage.fixed:
        found = await check_image(storage, header)
        if found.corruptions > found.overlaps:
            raise _beyond_repair(found)
    result = await check_image(storage, header, repair=Repair.CRASH)
    if result.corruptions or result.check_errors or result.need_check:
        raise _beyond_repair(result)
    _log.warning(
        "%s: is consistent (%d errors repaired, %d leaked clusters given back)",
        path,
        result.corruptions_fixed,
        result.leaks_fixed,
    )
    return result.header


def _beyond_repair(result: CheckResult) -> CorruptError:
    errors = result.corruptions + result.check_errors
    return CorruptError(
        result.filename,
        f"was not closed cleanly, and {errors} errors could not be repaired; see `qedfuse check -r all`",
    )
