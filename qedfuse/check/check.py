"""Consistency check of a QED image: every table is walked, every cluster of the file counted.

What is found, and how it counts (QEMU 7.2, `qemu-img check`, is the reference):

- corruptions: an L1 or L2 entry that is not cluster-aligned, lies in the header or not wholly inside the file (the
  file's size in whole sectors, rounded down to clusters); each cluster that is referenced again after a first
  reference, by whatever table. A table that overlaps something is not followed. L1 entries have no value 1; an L2 entry
  1 reads as zeroes.
- leaks: clusters that no table refers to, from the header's end to the file's last whole cluster, whether they are
  holes of the host or not. Those that only entries past the image's end refer to are used: an image that was cut short
  keeps them, as holes.
- NEED_CHECK left over and unknown autoclear bits are no faults by themselves.

Where it differs from QEMU's numbers:

- QEMU divides by cluster_size - 1 to number clusters, and so reports one leaked cluster too many for every
  cluster_size - 1 clusters of the file (from 16 MiB on with 4 KiB clusters, from 4 GiB on with 64 KiB), in any image,
  its own included. Here is the true count.
- On a block device it counts everything as leaked that nothing refers to, up to the device's end. Here nothing is: it
  is free, and used before the device counts as full (`reserve.py`).

How repair works, and why a crash in it does no harm, is in `repair.py`.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from qedfuse.check.gap_filling import fill_gaps, punch
from qedfuse.check.repair import extend, repair_tables
from qedfuse.check.result import MAX_PROBLEMS, CheckResult
from qedfuse.errors import QedfuseError, ReadOnlyError
from qedfuse.host.chunks import TableChunks, unpack_entries
from qedfuse.host.storage import Storage
from qedfuse.host.waiting import Breather
from qedfuse.progress import Report
from qedfuse.qed.cluster_map import ClusterMap, Marks
from qedfuse.qed.header import FEATURE_NEED_CHECK, Header
from qedfuse.qed.header_io import write_header
from qedfuse.qed.table_walk import Bounds, L1Entries
from qedfuse.sizes import ENTRY_SIZE
from qedfuse.text import describe


class Repair(Enum):
    """What check_image may change: nothing, give leaked clusters back, or everything.

    COMPACT is LEAKS, and what only entries past the image's end refer to goes, too.

    CRASH is for `recovery.py`: everything that does not take long, so that leaks in the middle of the file are only
    punched; and a table or cluster that is cut off keeps what the file has of it.
    """

    NONE = "none"
    LEAKS = "leaks"
    COMPACT = "compact"
    ALL = "all"
    CRASH = "crash"


async def check_image(
    storage: Storage, header: Header, *, repair: Repair = Repair.NONE, progress: Report | None = None
) -> CheckResult:
    """Check an image, and repair it as far as `repair` says. The caller sees to it that nothing else writes it.

    `progress(done, total)` is called with L1 entries, for each walk over the tables (a repair takes several) from 0,
    and with clusters while they are moved. Memory is one bit for each cluster of the file, and 170 MiB at most if the
    file is sparse; four times as much while clusters are moved. With LEAKS and COMPACT, nothing is changed if there
    is any corruption: what a damaged table referred to looks leaked, and may be what is to be rescued.

    Raises OSError: the host's, for the header or the L1 table or while repairing; CorruptError for an L1 table outside
    the file and for an image that cannot be checked in bounded memory or repaired in bounded space; ReadOnlyError.
    After an error or cancellation in a repair the image is no worse than before, and can be repaired again.
    """
    result, used = await _scan(storage, header, progress)
    if header.needs_check:
        result.note("the image was not closed cleanly (need_check is set)")
    if repair is Repair.NONE or result.check_errors:
        return result
    if not storage.writable:
        raise ReadOnlyError(storage.path, "cannot be repaired: it is open read-only")
    if repair in (Repair.LEAKS, Repair.COMPACT) and result.corruptions:
        if result.leaks:
            result.note("leaked clusters are kept as long as the image is corrupt; repair all")
        return result
    compacting = repair is Repair.COMPACT and storage.size() > result.image_end_offset  # by a part of a cluster, too
    if result.corruptions or result.leaks or header.needs_check or compacting or _is_cut(result, repair):
        return await _repair(storage, result, used, progress, repair)
    return result


def _is_cut(result: CheckResult, repair: Repair) -> bool:
    """Whether what lies past the image's end is to go."""
    return repair is Repair.COMPACT and result.past_end_clusters > 0


async def _repair(
    storage: Storage, found: CheckResult, used: ClusterMap, progress: Report | None, repair: Repair
) -> CheckResult:
    """The steps of the rulebook in `repair.py`. `found` and `used` are from the scan before."""
    header = found.header
    if header != header.with_known_autoclear():
        header = header.with_known_autoclear()
        await write_header(storage, header)
    result = replace(found, header=header)
    crash = repair is Repair.CRASH
    if crash and found.cut_end:
        await extend(storage, found.cut_end)
        result, used = await _scan(storage, header, progress)
    if result.corruptions or _is_cut(result, repair):
        await repair_tables(storage, header, overlaps=result.overlaps > 0, progress=progress)
        result, used = await _scan_again(storage, header, progress, found)
    if not (result.corruptions or result.check_errors):
        if crash:
            await punch(storage, header, used)
            _count_leaks(storage, result, used)
        else:
            header = await fill_gaps(storage, header, used, progress)
            if result.leaks:
                result, used = await _scan_again(storage, header, progress, result)
        if header.needs_check:
            header = header.with_feature(FEATURE_NEED_CHECK, False)
            await write_header(storage, header)
        result.header = header
    result.corruptions_fixed = max(0, found.corruptions - result.corruptions)
    result.leaks_fixed = max(0, found.leaks - result.leaks)
    return result


async def _scan_again(
    storage: Storage, header: Header, progress: Report | None, before: CheckResult
) -> tuple[CheckResult, ClusterMap]:
    result, used = await _scan(storage, header, progress)
    result.problems = (result.problems + before.problems)[:MAX_PROBLEMS]  # first what is still wrong
    result.problem_count += before.problem_count
    return result, used


async def _scan(storage: Storage, header: Header, progress: Report | None) -> tuple[CheckResult, ClusterMap]:
    """One walk over all tables, in QEMU's order and with its idea of what counts."""
    geometry = header.geometry
    file_size = storage.size()
    header.validate_file_size(file_size, storage.path)
    bounds = Bounds.of(header, file_size)
    used = ClusterMap(storage, bounds)
    used.mark(header.l1_table_offset // header.cluster_size, header.table_size)
    result = CheckResult(storage.path, header, total_clusters=geometry.clusters_for(header.image_size))
    breathe = Breather()
    if progress is not None:
        progress(0, geometry.table_entries)
    async for index, offset in L1Entries(storage, header, breathe):
        if not bounds.holds(offset, geometry.table_bytes):
            result.corruptions += 1
            result.note(f"l1 entry {index}: {offset:#x} {bounds.fault(offset, geometry.table_bytes)}")
            if bounds.cuts(offset, geometry.table_bytes):
                result.cut_end = max(result.cut_end, offset + geometry.table_bytes)
        elif again := used.mark(offset // header.cluster_size, header.table_size):
            result.overlaps += again
            result.corruptions += again
            result.tables_not_followed += 1
            result.note(f"l1 entry {index}: the l2 table at {offset:#x} overlaps other tables or data")
        else:
            chunks = TableChunks(storage, offset, geometry.table_bytes, breathe)
            await _scan_l2(chunks, result, used, bounds, index, offset)
        if progress is not None:
            progress(index + 1, geometry.table_entries)
    result.image_end_offset = used.end_of_marked() * header.cluster_size
    if not result.check_errors:
        _count_leaks(storage, result, used)
    if progress is not None:
        progress(geometry.table_entries, geometry.table_entries)
    return result, used


async def _scan_l2(
    chunks: TableChunks, result: CheckResult, used: ClusterMap, bounds: Bounds, index: int, offset: int
) -> None:
    """Count what the L2 table at `offset`, of L1 entry `index`, refers to."""
    geometry = bounds.header.geometry
    inside = bounds.entries_inside(index) * ENTRY_SIZE
    if not inside:
        result.past_end_clusters += geometry.table_size
    last = 0
    try:
        async for position, chunk in chunks:
            for part, start in _split(chunk, position, inside):
                before = used.marked
                marks = used.mark_entries(part, last)
                last = marks.last
                result.allocated_clusters += marks.allocated
                result.fragmented_clusters += marks.fragmented
                result.corruptions += len(marks.invalid) + len(marks.again)
                result.overlaps += len(marks.again)
                if start >= inside:
                    result.past_end_clusters += used.marked - before
                if marks.invalid or marks.again:
                    _note_entries(result, bounds, part, index * geometry.table_entries + start // ENTRY_SIZE, marks)
    except QedfuseError:
        raise
    except OSError as error:
        result.check_errors += 1
        result.note(f"the l2 table at {offset:#x} cannot be read: {describe(error, result.filename)}", first=True)


def _split(chunk: bytearray, position: int, inside: int) -> list[tuple[bytearray, int]]:
    """A chunk of a table as what maps the inside of the image and what lies past its end, each with its position."""
    cut = inside - position
    if 0 < cut < len(chunk):
        return [(chunk[:cut], position), (chunk[cut:], inside)]
    return [(chunk, position)]


def _note_entries(result: CheckResult, bounds: Bounds, chunk: bytearray, first: int, marks: Marks) -> None:
    entries = unpack_entries(chunk)
    size = bounds.header.cluster_size
    if bounds.end < bounds.size and any(entries[position] == bounds.end for position in marks.invalid):
        result.cut_end = max(result.cut_end, bounds.end + size)
    for position in sorted(marks.invalid + marks.again):
        if result.problem_count < MAX_PROBLEMS:
            cluster = entries[position]
            valid = bounds.holds(cluster, size)
            fault = "is used more than once" if valid else bounds.fault(cluster, size)
            guest = (first + position) * size
            result.note(f"l2 entry for guest offset {guest:#x}: cluster {cluster:#x} {fault}")
        else:
            result.problem_count += 1


def _count_leaks(storage: Storage, result: CheckResult, used: ClusterMap) -> None:
    """On a device, what nothing refers to is free, not leaked."""
    if not storage.fixed:
        end = Bounds.of(result.header, storage.size()).end  # a repair shortens the file
        result.leaks = min(used.clusters, end // result.header.cluster_size) - result.header.header_size - used.marked
