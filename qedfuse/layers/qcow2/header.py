"""The qcow2 header and its table entries: decode and validate, read-only. Pure: no I/O.

Only what reading the active disk and `map` need: snapshots, bitmaps and compatible features are ignored. All numbers
are big-endian. Source: QEMU docs/interop/qcow2, "Header", "Header extensions", "Cluster mapping"; limits that the
format leaves open are QEMU's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from qedfuse.errors import CorruptError, FormatError, UnsupportedError
from qedfuse.sizes import ENTRY_SIZE, MAX_OFFSET, PAGE_SIZE, SECTOR_SIZE, round_down
from qedfuse.text import decode_backing_name

MAGIC = b"QFI\xfb"
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
V2_BYTES = _V2.size
V3_BYTES = V2_BYTES + _V3.size

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MAX_BACKING_NAME = 1023
MAX_BACKING_FORMAT = 15

INCOMPATIBLE_DIRTY = 1  # refcounts may be stale: no matter to a reader
INCOMPATIBLE_CORRUPT = 2
INCOMPATIBLE_DATA_FILE = 4
INCOMPATIBLE_COMPRESSION = 8
INCOMPATIBLE_EXTENDED_L2 = 16
_KNOWN_INCOMPATIBLE = 31

_COMPATIBLE_LAZY_REFCOUNTS = 1
_MAX_REFCOUNT_ORDER = 6

_EXTENSION_END = 0
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_CRYPT_METHODS = {1: "aes", 2: "luks"}
_COMPRESSION_TYPES = {1: "zstd"}


@dataclass(frozen=True)
class Qcow2Header:
    """What reading a qcow2 image takes, and what is shown of it. `virtual_size` in bytes, `l1_size` in entries.

    `backing_name` is as stored (relative to the image), None without a backing file; `backing_format` is None where
    the image does not say, so that the backing file must be probed.
    """

    version: int
    cluster_bits: int
    virtual_size: int
    l1_size: int
    l1_table_offset: int
    backing_name: str | None
    backing_format: str | None
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    refcount_bits: int = 16
    lazy_refcounts: bool = False

    @classmethod
    def decode(cls, raw: bytes, path: str) -> Qcow2Header:
        """The header in a file's first cluster; `raw` may be shorter if the file is. `path` is for messages.

        Raises FormatError (not qcow2, a field out of range), UnsupportedError (encryption, an external data file, a
        compression other than deflate, extended L2 entries, unknown feature bits), CorruptError (marked as corrupt).
        """
        cluster_bits = decode_cluster_bits(raw, path)
        fields = _V2.unpack_from(raw)
        _magic, version, name_offset, name_size, _bits, size, crypt_method, l1_size, l1_table_offset = fields[:9]
        header_bytes = _check_features(raw, 1 << cluster_bits, path) if version >= 3 else V2_BYTES
        if crypt_method:
            method = _CRYPT_METHODS.get(crypt_method, f"method {crypt_method}")
            raise UnsupportedError(path, f"encrypted ({method}): qcow2 encryption is not supported{_CONVERT}")
        header = cls(
            version,
            cluster_bits,
            size,
            l1_size,
            l1_table_offset,
            _decode_name(raw, name_offset, name_size, 1 << cluster_bits, path),
            _decode_format(raw, header_bytes, name_offset, path) if name_offset else None,
            *fields[9:11],
            *(_decode_refcounts(raw) if version >= 3 else ()),
        )
        header._validate(path)
        return header

    def _validate(self, path: str) -> None:
        if self.virtual_size > MAX_OFFSET:
            raise FormatError(path, f"image size {self.virtual_size} is too large (at most {MAX_OFFSET})")
        if self.l1_table_offset % self.cluster_size:
            raise FormatError(path, f"l1 table offset {self.l1_table_offset:#x} is not cluster-aligned")
        if self.l1_size < self.l1_entries:
            raise FormatError(
                path, f"the l1 table has {self.l1_size} entries, but the image size needs {self.l1_entries}"
            )

    def validate_file_size(self, file_size: int, path: str) -> None:
        """Check that what is used of the L1 table lies inside a file of `file_size` bytes. Raises CorruptError."""
        end = self.l1_table_offset + self.l1_entries * ENTRY_SIZE
        if end > file_size:
            raise CorruptError(
                path, f"the l1 table ends at {end}, past the end of the file ({file_size} bytes); the file is cut off"
            )

    @cached_property
    def size(self) -> int:
        """Bytes of the disk: whole sectors, as QEMU shows it. The format allows any virtual size."""
        return round_down(self.virtual_size, SECTOR_SIZE)

    @cached_property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of an L2 table that are read at a time: 4 KiB, or the whole table (one cluster) if that is smaller."""
        return min(PAGE_SIZE, self.cluster_size)

    @cached_property
    def page_entries(self) -> int:
        return self.page_bytes // ENTRY_SIZE

    @cached_property
    def page_coverage_bits(self) -> int:
        """A page of L2 entries maps 2 to the power of this guest bytes."""
        return self.cluster_bits + self.page_entries.bit_length() - 1

    @cached_property
    def table_coverage_bits(self) -> int:
        """An L2 table maps 2 to the power of this guest bytes."""
        return self.cluster_bits + (self.cluster_size // ENTRY_SIZE).bit_length() - 1

    @cached_property
    def l1_entries(self) -> int:
        """L1 entries that the virtual size uses; what follows maps machine states of snapshots and is never read."""
        return -(-self.virtual_size >> self.table_coverage_bits)


def decode_cluster_bits(raw: bytes, path: str) -> int:
    """The exponent of the cluster size, which says how far the header goes, from a file's first bytes.

    Raises FormatError (not a qcow2 image of version 2 or later, cut off, out of range), UnsupportedError (version).
    """
    if raw[: len(MAGIC)] != MAGIC:
        raise FormatError(path, "not a qcow2 image (no qcow2 magic at the start)")
    if len(raw) < V2_BYTES:
        raise FormatError(path, f"the header is cut off ({len(raw)} of {V2_BYTES} bytes)")
    _magic, version, _name_offset, _name_size, cluster_bits = _V2.unpack_from(raw)[:5]
    if version not in (2, 3):
        raise UnsupportedError(path, f"qcow2 version {version} is not supported (only 2 and 3)")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise FormatError(path, f"cluster bits {cluster_bits} is not from {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}")
    return int(cluster_bits)


_CONVERT = "; make an image without it: qemu-img convert -O qcow2"


def _check_features(raw: bytes, cluster_size: int, path: str) -> int:
    """Refuse what the version 3 fields ask for and qedfuse lacks. Returns the header's length in bytes."""
    if len(raw) < V3_BYTES:
        raise FormatError(path, f"the header is cut off ({len(raw)} of {V3_BYTES} bytes)")
    incompatible, _compatible, _autoclear, _refcount_order, header_bytes = _V3.unpack_from(raw, V2_BYTES)
    if not V3_BYTES <= header_bytes <= cluster_size:
        raise FormatError(path, f"header length {header_bytes} is not from {V3_BYTES} to {cluster_size}")
    unknown = incompatible & ~_KNOWN_INCOMPATIBLE
    if unknown:
        raise UnsupportedError(path, f"unsupported qcow2 feature bits {unknown:#x}")
    if incompatible & INCOMPATIBLE_DATA_FILE:
        raise UnsupportedError(path, f"qcow2 with an external data file is not supported{_CONVERT}")
    if incompatible & INCOMPATIBLE_EXTENDED_L2:
        raise UnsupportedError(path, f"qcow2 with extended l2 entries (subclusters) is not supported{_CONVERT}")
    compression = raw[V3_BYTES] if header_bytes > V3_BYTES and len(raw) > V3_BYTES else 0
    if incompatible & INCOMPATIBLE_COMPRESSION:
        name = _COMPRESSION_TYPES.get(compression, str(compression))
        raise UnsupportedError(path, f"qcow2 compression type {name} is not supported (only zlib){_CONVERT}")
    if compression:
        raise FormatError(path, f"compression type {compression} without its feature bit")
    if incompatible & INCOMPATIBLE_CORRUPT:
        raise CorruptError(path, "marked as corrupt; repair it first: qemu-img check -r all")
    return int(header_bytes)


def _decode_refcounts(raw: bytes) -> tuple[int, bool]:
    """Their width (bits; 0: not a valid one, which a reader need not mind) and whether they may be stale."""
    _incompatible, compatible, _autoclear, order, _header_bytes = _V3.unpack_from(raw, V2_BYTES)
    return 1 << order if order <= _MAX_REFCOUNT_ORDER else 0, bool(compatible & _COMPATIBLE_LAZY_REFCOUNTS)


def decode_v3(raw: bytes) -> tuple[int, int]:
    """The incompatible feature bits and the header's length (bytes), of a header of version 3 that was validated."""
    incompatible, _compatible, _autoclear, _order, header_bytes = _V3.unpack_from(raw, V2_BYTES)
    return incompatible, header_bytes


def _decode_name(raw: bytes, offset: int, size: int, cluster_size: int, path: str) -> str | None:
    if offset == 0 or size == 0:
        return None
    if size > MAX_BACKING_NAME:
        raise FormatError(path, f"the backing file's name has {size} bytes (at most {MAX_BACKING_NAME})")
    if offset + size > min(cluster_size, len(raw)):
        raise FormatError(path, "the backing file's name lies outside the header's cluster")
    return decode_backing_name(raw[offset : offset + size], path)


def _decode_format(raw: bytes, start: int, end: int, path: str) -> str | None:
    """The backing format extension's string. The extensions lie between the header and the backing file's name."""
    found = b""
    for kind, data, length in extensions(raw, start, end, path):
        if kind == _EXTENSION_BACKING_FORMAT:
            if length > MAX_BACKING_FORMAT:
                raise FormatError(path, f"the backing format has {length} bytes (at most {MAX_BACKING_FORMAT})")
            found = raw[data : data + length].split(b"\0")[0]
    return found.decode("ascii", "backslashreplace") or None


def extensions(raw: bytes, start: int, end: int, path: str) -> Iterator[tuple[int, int, int]]:
    """The header extensions in bytes [start, end) of a file's first cluster: type, where the data begins, its length.

    Raises FormatError for one that goes past the end.
    """
    while start < end:
        data = start + _EXTENSION.size
        if data > min(end, len(raw)):
            raise FormatError(path, f"the header extension at {start} is cut off")
        kind, length = _EXTENSION.unpack_from(raw, start)
        if kind == _EXTENSION_END:
            break
        if length > end - data:
            raise FormatError(path, f"the header extension at {start} is too large ({length} bytes)")
        yield kind, data, length
        start = data + (length + 7) // 8 * 8
