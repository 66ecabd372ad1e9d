"""A qcow2 image becomes a QED image where it is: its data clusters stay.

    plan         refuse what QED cannot say or what is not in order; count what comes behind the end
    write_tail   the L1 table, L2 tables, and unpacked clusters, in this order, behind the file's last cluster; the
                 backing file's name, if it is longer than the first sector has room for, where the first cluster has
                 nothing
    (switch)     the first sector: QED's header and, as a rule, the backing file's name
    finish       what only qcow2's tables led to (they themselves, the reference counts, the places of compressed
                 clusters and of clusters that read as zeroes) is given back, as `qedfuse check -r leaks` does it:
                 clusters from the end fill the gaps, and the file is cut. It may crash anywhere, see `check/repair.py`

Source: QEMU docs/interop/qcow2, docs/interop/qed_spec.
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace

from qedfuse.chain.unfinished import SUFFIX, Unfinished, changed_meanwhile
from qedfuse.check.check import Repair, check_image
from qedfuse.errors import CorruptError, FormatError, QedfuseError, UnsupportedError, UsageError
from qedfuse.host.storage import Storage, read
from qedfuse.layers.qcow2.header import Qcow2Header
from qedfuse.layers.qcow2.header_rest import HeaderRest
from qedfuse.layers.qcow2.layer import read_qcow2_header
from qedfuse.progress import Report
from qedfuse.qed.geometry import DEFAULT_TABLE_SIZE, MAX_TABLE_SIZE, MIN_CLUSTER_SIZE, Geometry
from qedfuse.qed.header import HEADER_BYTES, Header
from qedfuse.qed.header_io import read_fields, read_header
from qedfuse.qed.new_image import new_header
from qedfuse.sizes import SECTOR_SIZE, round_up
from qedfuse.tools.in_place.plan import Wanted
from qedfuse.tools.in_place.qcow2_scan import end_in_use, scan
from qedfuse.tools.in_place.qcow2_tail import Tail
from qedfuse.tools.in_place.rehearsal import is_unused

#: What a QED image can say of its backing file: it is raw, or to be probed.
_PROBED_FORMATS = (None, "qcow2", "qed")
_COPY = "qedfuse convert makes a copy"


class Qcow2ToQed:
    """See `plan.Converter`."""

    async def plan(self, storage: Storage, wanted: Wanted, progress: Report) -> Qcow2ToQedConversion:
        """The cluster size can only be what the image has; the table size is the smallest from 4 on that maps the
        image. With `force`, persistent bitmaps may be lost. `progress` as for `qcow2_scan.scan`."""
        path = storage.path
        old, rest = await _read_header(storage)
        _refuse(old, rest, path, force=wanted.force)
        if wanted.cluster_size not in (None, old.cluster_size):
            raise UsageError(path, f"clusters stay where they are, so cluster_size can only be {old.cluster_size}")
        name = os.fsencode(old.backing_name or "")
        header, name_offset = _new_header(old, rest, _geometry(old, wanted.table_size), name, path)
        header = replace(header, l1_table_offset=round_up(storage.size(), old.cluster_size))
        demand = await scan(storage, old, header, progress)
        tail = Tail(storage.size(), old, header, demand, name, name_offset)
        return Qcow2ToQedConversion(storage.size(), tail)

    async def resume(self, storage: Storage, unfinished: Unfinished) -> Qcow2ToQedConversion:
        """The new header is not the same bytes for ever: `finish` may move the L1 table."""
        try:
            now = await read_fields(storage)
            was = Header.decode(unfinished.new_first or b"", storage.path)
        except QedfuseError:
            raise changed_meanwhile(unfinished, storage.path) from None
        if now.geometry != was.geometry:
            raise changed_meanwhile(unfinished, storage.path)
        return Qcow2ToQedConversion(unfinished.old_size, None)

    async def is_unused(self, storage: Storage, unfinished: Unfinished) -> bool:
        wanted = Wanted(table_size=(await read_header(storage)).table_size, force=True)
        return await is_unused(storage, unfinished, unfinished.old_size, self, wanted)

    async def old_end(self, storage: Storage, unfinished: Unfinished) -> int:
        """QEMU puts clusters where the reference counts say that nothing is, be it in the tail."""
        old, rest = await _read_header(storage)
        if rest.dirty or not old.refcount_bits:
            return storage.size()
        whole = round_up(unfinished.old_size, old.cluster_size)
        end = await end_in_use(storage, old)
        if end > whole:
            return end
        added = await read(storage, unfinished.old_size, max(0, min(whole, storage.size()) - unfinished.old_size))
        return whole if any(added) else unfinished.old_size


async def _read_header(storage: Storage) -> tuple[Qcow2Header, HeaderRest]:
    header = await read_qcow2_header(storage)
    raw = await read(storage, 0, min(storage.size(), header.cluster_size))
    return header, HeaderRest.decode(raw, header, storage.path)


def _refuse(old: Qcow2Header, rest: HeaderRest, path: str, *, force: bool) -> None:
    """What is no matter to a reader, but cannot be or should not be taken over. Raises QedfuseError."""
    if old.cluster_size < MIN_CLUSTER_SIZE:
        raise UnsupportedError(
            path, f"its clusters of {old.cluster_size} bytes are below qed's {MIN_CLUSTER_SIZE}; {_COPY}"
        )
    if not old.refcount_bits:
        raise FormatError(path, "the width of its reference counts is out of range")
    if not old.refcount_table_clusters:
        raise CorruptError(path, "has no reference counts; check and repair it first: qemu-img check -r all")
    if rest.dirty:
        raise UnsupportedError(path, "was not closed cleanly (dirty); repair it first: qemu-img check -r all")
    if rest.snapshots:
        raise UnsupportedError(
            path, f"has internal snapshots ({rest.snapshots}), which qed has not: qemu-img snapshot -d deletes them"
        )
    if rest.bitmaps and not force:
        raise UnsupportedError(
            path, f"has persistent bitmaps ({rest.bitmaps}), which would be lost: allow it with --force"
        )
    if old.backing_name is not None and old.backing_format not in (*_PROBED_FORMATS, "raw"):
        raise UnsupportedError(path, f"its backing file's format is {old.backing_format}, which qed cannot say")


def _geometry(old: Qcow2Header, table_size: int | None) -> Geometry:
    if table_size is not None:
        return Geometry(old.cluster_size, table_size)
    geometry = Geometry(old.cluster_size, DEFAULT_TABLE_SIZE)
    while geometry.max_image_size < old.size and geometry.table_size < MAX_TABLE_SIZE:
        geometry = Geometry(old.cluster_size, geometry.table_size * 2)
    return geometry


def _new_header(old: Qcow2Header, rest: HeaderRest, geometry: Geometry, name: bytes, path: str) -> tuple[Header, int]:
    """The header, all but where the L1 table is, and where the name goes, if there is one. Raises QedfuseError."""
    if old.size > geometry.max_image_size:
        raise QedfuseError(
            path,
            f"size {old.size} is over {geometry.max_image_size}, all that cluster_size={geometry.cluster_size},"
            f"table_size={geometry.table_size} can map; {_COPY} with larger clusters",
            errno.EFBIG,
        )
    header = new_header(path, old.size, geometry)
    if not name:
        return header, 0
    offset = HEADER_BYTES if HEADER_BYTES + len(name) <= SECTOR_SIZE else rest.room(len(name))
    if offset is None:
        raise QedfuseError(
            path,
            f"the header has no room for the backing file's name, {len(name)} bytes: shorten it (qemu-img rebase -u)",
            errno.ENAMETOOLONG,
        )
    return header.with_backing_file(offset, len(name), is_raw=old.backing_format == "raw"), offset


class Qcow2ToQedConversion:
    """See `plan.Conversion`. `tail` None: the file is the new image already."""

    altered = False

    def __init__(self, old_size: int, tail: Tail | None) -> None:
        self._tail = tail
        self.old_size = old_size
        self.new_bytes = tail.end - old_size if tail else 0

    async def write_tail(self, storage: Storage, progress: Report) -> bytes:
        """`progress` as for `Tail.write`. Raises CorruptError (a stream that cannot be unpacked), too."""
        if self._tail is None:
            raise ValueError(f"{storage.path} is the new image already")
        return await self._tail.write(storage, progress)

    async def restore(self, storage: Storage) -> None:
        if self._tail is not None:
            await self._tail.restore_name(storage)

    async def finish(self, storage: Storage, progress: Report) -> None:
        """`progress` as for `check.check_image`. Raises CorruptError (another program has damaged it), too."""
        header = await read_header(storage)
        repair = Repair.ALL if header.needs_check else Repair.LEAKS  # another program may have used it meanwhile
        result = await check_image(storage, header, repair=repair, progress=progress)
        if result.corruptions or result.check_errors:
            raise CorruptError(
                storage.path,
                f"is damaged: {result.problems[0]}; if another program did that, remove {storage.path}{SUFFIX}, and "
                "repair it: qedfuse check -r all",
            )
