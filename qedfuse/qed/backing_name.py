"""Another backing file's name in an image that is closed, and nothing else: neither the old one nor the new is opened.

The order is that of `commit.py`, "Replacing the backing file"; but nobody vouches for what the guest reads.
"""

from __future__ import annotations

from qedfuse.host.storage import Storage
from qedfuse.qed.allocator import Allocator
from qedfuse.qed.commit import Committer
from qedfuse.qed.header import Header
from qedfuse.qed.table_pages import shared_pool
from qedfuse.qed.tables import Tables


async def set_backing_name(storage: Storage, header: Header, name: bytes, *, is_raw: bool) -> None:
    """Store `name` (empty: none), durably. `header` is the file's, `is_raw`: what it names must not be probed.

    Raises QedfuseError (ENAMETOOLONG), with nothing changed; OSError: it is the old name or the new one.
    """
    tables = Tables(storage, header, shared_pool())
    allocator = Allocator(header.geometry, storage.size(), fixed=storage.fixed)
    tables.begin_writing(allocator)
    committer = Committer(storage, header, tables, allocator)
    await committer.replace_backing(name, is_raw=is_raw, replaced=lambda: None)
