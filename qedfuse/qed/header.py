"""The QED header: decode, validate, encode. Pure: no I/O.

Layout (little-endian, 64 bytes at offset 0): QEMU docs/interop/qed_spec, "Header". The backing file's name lies inside
the header's clusters, wherever backing_filename_offset says.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass, replace
from functools import cached_property

from qedfuse.errors import CorruptError, FormatError, QedfuseError, UnsupportedError
from qedfuse.qed.geometry import Geometry
from qedfuse.sizes import SECTOR_SIZE, whole_sectors

MAGIC = b"QED\0"
_STRUCT = struct.Struct("<4sIIIQQQQQII")
HEADER_BYTES = _STRUCT.size

FEATURE_BACKING_FILE = 1
FEATURE_NEED_CHECK = 2
FEATURE_BACKING_FORMAT_NO_PROBE = 4
KNOWN_FEATURES = FEATURE_BACKING_FILE | FEATURE_NEED_CHECK | FEATURE_BACKING_FORMAT_NO_PROBE
KNOWN_AUTOCLEAR_FEATURES = 0

#: A path on Linux is at most this long; a longer name cannot be opened.
MAX_BACKING_NAME = 4095


class NotQedError(FormatError):
    """The file does not even begin as a QED image does."""


@dataclass(frozen=True)
class Header:
    """A QED header's fields; sizes in bytes but table_size and header_size, which count clusters."""

    cluster_size: int
    table_size: int
    header_size: int
    features: int
    compat_features: int
    autoclear_features: int
    l1_table_offset: int
    image_size: int
    backing_filename_offset: int = 0
    backing_filename_size: int = 0

    @classmethod
    def decode(cls, raw: bytes, path: str) -> Header:
        """The header in the first 64 bytes of a file.

        Checks the fields that can be checked without the file: sizes, alignment, feature bits. `path` is for messages.
        Raises NotQedError, FormatError (a field out of range), UnsupportedError (an unknown feature bit).
        """
        if raw[: len(MAGIC)] != MAGIC:
            raise NotQedError(path, "not a qed image (no qed magic at the start)")
        if len(raw) < HEADER_BYTES:
            raise FormatError(path, f"the header is cut off ({len(raw)} of {HEADER_BYTES} bytes)")
        header = cls(*_STRUCT.unpack_from(raw)[1:])
        header._validate(path)
        return header

    def _validate(self, path: str) -> None:
        try:
            geometry = self.geometry
        except ValueError as error:
            raise FormatError(path, str(error)) from None
        unknown = self.features & ~KNOWN_FEATURES
        if unknown:
            raise UnsupportedError(path, f"unsupported qed feature bits {unknown:#x}")
        if self.header_size < 1 or self.header_bytes > 1 << 32:
            raise FormatError(path, f"header size {self.header_size} clusters is out of range")
        if self.image_size % SECTOR_SIZE:
            raise FormatError(path, f"image size {self.image_size} is not a multiple of {SECTOR_SIZE}")
        if self.image_size > geometry.max_image_size:
            raise FormatError(path, f"image size {self.image_size} is over this geometry's {geometry.max_image_size}")
        if self.l1_table_offset % self.cluster_size:
            raise FormatError(path, f"l1 table offset {self.l1_table_offset:#x} is not cluster-aligned")
        if self.l1_table_offset < self.header_bytes:
            raise FormatError(path, f"l1 table offset {self.l1_table_offset:#x} lies inside the header")
        if self.has_backing_file:
            end = self.backing_filename_offset + self.backing_filename_size
            if self.backing_filename_offset < HEADER_BYTES or end > self.header_bytes:
                raise FormatError(path, "the backing file's name lies outside the header")
            if not 0 < self.backing_filename_size <= MAX_BACKING_NAME:
                raise FormatError(
                    path, f"the backing file's name has {self.backing_filename_size} bytes (1 to {MAX_BACKING_NAME})"
                )

    def validate_file_size(self, file_size: int, path: str) -> None:
        """Check that header and L1 table lie inside a file of `file_size` bytes. Raises CorruptError. What the last
        sector lacks counts as there."""
        end = self.l1_table_offset + self.geometry.table_bytes
        if end > whole_sectors(file_size):
            raise CorruptError(
                path, f"the l1 table ends at {end}, past the end of the file ({file_size} bytes); the file is cut off"
            )

    def encode(self) -> bytes:
        """The 64 bytes that go to offset 0."""
        return _STRUCT.pack(
            MAGIC,
            self.cluster_size,
            self.table_size,
            self.header_size,
            self.features,
            self.compat_features,
            self.autoclear_features,
            self.l1_table_offset,
            self.image_size,
            self.backing_filename_offset,
            self.backing_filename_size,
        )

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry(self.cluster_size, self.table_size)

    @property
    def header_bytes(self) -> int:
        return self.header_size * self.cluster_size

    @property
    def has_backing_file(self) -> bool:
        return bool(self.features & FEATURE_BACKING_FILE)

    @property
    def needs_check(self) -> bool:
        return bool(self.features & FEATURE_NEED_CHECK)

    @property
    def backing_is_raw(self) -> bool:
        """The backing file must not be probed: it is raw, whatever its first bytes look like."""
        return bool(self.features & FEATURE_BACKING_FORMAT_NO_PROBE)

    def with_feature(self, bit: int, on: bool) -> Header:
        return replace(self, features=self.features | bit if on else self.features & ~bit)

    def room_for_name(self, size: int, path: str) -> int:
        """The offset at which `size` bytes of a name can be put without touching the name that is there. Raises
        QedfuseError (ENAMETOOLONG), with the image's `path`, if the header's clusters have no such room."""
        gaps = [(HEADER_BYTES, self.header_bytes)]
        if self.has_backing_file:
            end = self.backing_filename_offset + self.backing_filename_size
            gaps = [(HEADER_BYTES, self.backing_filename_offset), (end, self.header_bytes)]
        room = min(MAX_BACKING_NAME, max(end - start for start, end in gaps))
        if size > room:
            raise QedfuseError(
                path,
                f"the backing file's name has {size} bytes; the header has room for {room}",
                errno.ENAMETOOLONG,
            )
        return next(start for start, end in gaps if end - start >= size)

    def with_backing_file(self, offset: int, size: int, *, is_raw: bool) -> Header:
        """Another name, of `size` bytes at `offset`, or none (0, 0)."""
        features = self.features & ~(FEATURE_BACKING_FILE | FEATURE_BACKING_FORMAT_NO_PROBE)
        if size:
            features |= FEATURE_BACKING_FILE | (FEATURE_BACKING_FORMAT_NO_PROBE if is_raw else 0)
        return replace(self, features=features, backing_filename_offset=offset, backing_filename_size=size)

    def with_image_size(self, image_size: int) -> Header:
        return replace(self, image_size=image_size)

    def with_known_autoclear(self) -> Header:
        return replace(self, autoclear_features=self.autoclear_features & KNOWN_AUTOCLEAR_FEATURES)
