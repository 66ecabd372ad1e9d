"""The header in a file: read, and written when all before it is durable.

It waits by `waiting.py` alone: a command that only looks at headers runs this without an event loop (`run_blocking`).
"""

from __future__ import annotations

from qedfuse.host.storage import ReadStorage, Storage, read
from qedfuse.qed.header import HEADER_BYTES, Header
from qedfuse.text import decode_backing_name


async def read_fields(storage: ReadStorage) -> Header:
    """The header of a QED image by itself, whatever else its file holds. Raises NotQedError, FormatError,
    UnsupportedError; OSError."""
    return Header.decode(await read(storage, 0, min(HEADER_BYTES, storage.size())), storage.path)


async def read_header(storage: ReadStorage) -> Header:
    """The header of a QED image, validated against its file. Raises as `read_fields` does; CorruptError if the file is
    cut off."""
    header = await read_fields(storage)
    header.validate_file_size(storage.size(), storage.path)
    return header


async def read_backing_name(storage: ReadStorage, header: Header) -> str | None:
    """The backing file's name as stored in a QED image, None if it has none. Raises FormatError, OSError."""
    if not header.has_backing_file:
        return None
    raw = await read(storage, header.backing_filename_offset, header.backing_filename_size)
    return decode_backing_name(raw, storage.path)


async def write_header(storage: Storage, header: Header) -> None:
    """Make everything before durable, then the header. Raises OSError."""
    await storage.sync()
    await storage.write(0, [header.encode()])
    await storage.sync()
