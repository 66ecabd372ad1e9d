"""The seam: one object is all that the fast path, which is in C, knows of an image. C gets its attributes and calls its
methods by their names; nothing else in Python is known to it but the bytes of table pages.

All of it happens on the thread that runs the engine, between two steps of it: whatever C does in one go is atomic for
the engine. What C reads here holds until Python runs again; it asks for it anew (`refresh`) at the beginning of every
such stay, and tells what it has written (`note_written`, `note_taken`) before it asks again, and before it returns.
"""

from __future__ import annotations

from collections.abc import Sequence

from qedfuse.qed.cluster_writer import ClusterWriter
from qedfuse.qed.commit import Committer
from qedfuse.qed.image import Image
from qedfuse.qed.table_pages import PageWatcher
from qedfuse.sizes import HostOffset, PageIndex

_NOTHING = (0, 0)


class NativeView:
    """An open image as C sees it.

    For good:
        cluster_bits: log2 of a cluster's bytes.
        table_bits: log2 of the entries of a table.
        data_start: bytes of the file; no cluster and no L2 table begins before it.
        l1_offset: bytes of the file; where the L1 table begins.

    As of the last `refresh`:
        size: bytes that the guest sees.
        file_end: bytes of the file; every cluster and table ends there or before.
        writable: whether clusters that have data may be overwritten.
        free, free_end: bytes of the file, multiples of the cluster size; where clusters begin and end that read as
            zeroes, durably, and that C may take, from the front. Equal: none.

    None may be taken while a task holds a range or waits for one, since it may be about to give a cluster of the range
    data itself; nor when so much waits for a commit that a writer would have to see to one first.
    """

    __slots__ = (
        "_backing",
        "_clusters",
        "_committer",
        "_image",
        "_locks",
        "_tables",
        "cluster_bits",
        "data_start",
        "file_end",
        "free",
        "free_end",
        "l1_offset",
        "size",
        "table_bits",
        "writable",
    )

    def __init__(self, image: Image) -> None:
        self.cluster_bits = image.geometry.cluster_bits
        self.table_bits = image.geometry.table_entries.bit_length() - 1
        self.data_start = image.header.header_bytes
        self.l1_offset = image.header.l1_table_offset
        self._image = image
        self._backing = image.backing
        self._tables = image.tables
        self._locks = image.locks
        self._committer: Committer | None = None
        self._clusters: ClusterWriter
        self.refresh()

    def watch(self, l1: PageWatcher | None, l2: PageWatcher | None) -> None:
        """Tell of every page of the two table levels that is in memory, comes into it or leaves, from now on."""
        self._tables.l1.watch(l1)
        self._tables.l2.watch(l2)

    # -- asked --------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring the attributes that change up to date. Once in each burst: every nanosecond counts. Raises
        AssertionError if there is another backing file than C knows of: then all is left to Python."""
        if self._image.backing is not self._backing:
            raise AssertionError("the backing file was replaced behind the fast path's back")
        self.size: int = self._image.size
        self.file_end = self._tables.ends.end
        self.writable = False
        offer = _NOTHING
        committer = self._committer
        if committer is None:
            committer = self._begin_writing()
        if committer is not None and committer.failed is None:
            self.writable = True
            if not self._locks and not committer.crowded:
                offer = self._clusters.offer()
        self.free, self.free_end = offer

    def _begin_writing(self) -> Committer | None:
        self._committer = self._image.committer
        if self._committer is not None:
            self._clusters = self._image.clusters
        return self._committer

    def take_l1_page(self, index: int, host: int, content: bytes) -> bool:
        """`content`: a page of the L1 table, 4 KiB, which C has read at `host` in the file just now since page `index`
        of the table was not in memory. Returns whether it is there now, for C to use: not while a task is reading the
        page itself, to change it next perhaps."""
        return self._tables.take_page(self._tables.l1, index, host, content)

    def take_l2_page(self, index: int, host: int, content: bytes) -> bool:
        """The same for a page of an L2 table; `index` counts pages over the whole guest."""
        return self._tables.take_page(self._tables.l2, index, host, content)

    # -- told ---------------------------------------------------------------------------------------------------------

    def note_written(self) -> None:
        """Clusters that have data were overwritten, and nothing else has happened since the last `refresh`."""
        committer = self._committer
        assert committer is not None
        committer.note_written()

    def note_taken(self, first: int, taken: int, lost: int, filled: int, pages: Sequence[int]) -> None:
        """New clusters were written; others may have been overwritten.

        `taken` bytes of clusters were taken from the front of what is free, which is at `first`. Entries in these L2
        `pages` (indices over the whole guest), which are in memory, refer to them, but not to the last `lost` bytes,
        whose write has failed. The guest has written `filled` bytes of them.

        What was not offered must not be taken, nor anything while a range is locked: a task may have it, too. If it
        happens all the same, the image has failed, and its file stays as it is.
        """
        committer = self._committer
        assert committer is not None
        committer.note_written()
        start, end = self.free, self.free_end
        self.free = first + taken
        try:
            if self._locks:
                raise AssertionError("clusters were taken while a range was locked")
            if first != start or taken > end - start:
                raise AssertionError(f"{taken} bytes of clusters at {first:#x} were taken, not offered")
            self._clusters.take_offered(HostOffset(first), taken, lost, filled, [PageIndex(page) for page in pages])
        except BaseException as error:
            committer.give_up(error)
