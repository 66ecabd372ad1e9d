"""The segments of a disk that were found last, for programs that ask for one after the other."""

from __future__ import annotations

from bisect import bisect_right

from qedfuse.layers.disk import Disk
from qedfuse.layers.seek import Segments


class LastSegments:
    """What was found last: programs go from one segment to the next, and through a large one in small steps."""

    def __init__(self) -> None:
        self._disk: Disk | None = None
        self._version: object = None
        self._segments = Segments(0, False, [])

    def note(self, disk: Disk, version: object, segments: Segments) -> None:
        """`version`: the disk's when the search began."""
        if segments.ends:
            self._disk, self._version, self._segments = disk, version, segments

    def seek(self, disk: Disk, offset: int, *, data: bool) -> int | None:
        """See `Segments.seek`. None also if it is known no longer."""
        return self._segments.seek(offset, data=data) if self._holds(disk) else None

    def find(self, disk: Disk, offset: int, *, data: bool) -> Segments | None:
        """What `find_segments` would find, if it is known."""
        segments = self._segments
        index = bisect_right(segments.ends, offset)
        if not self._holds(disk) or offset < segments.start or index == len(segments.ends):
            return None
        rest = Segments(offset, segments.is_data ^ bool(index & 1), segments.ends[index:])
        wanted = 1 if not rest.is_data else 0 if data else 2
        return rest if len(rest.ends) >= wanted or rest.ends[-1] == disk.size else None

    def _holds(self, disk: Disk) -> bool:
        return disk is self._disk and disk.version == self._version
