"""The segments of an image that were found last, for programs that ask for one after the other."""

from __future__ import annotations

from bisect import bisect_right

from qedfuse.layers.seek import Segments
from qedfuse.qed.image import Image


class LastSegments:
    """What was found last: programs go from one segment to the next, and through a large one in small steps."""

    def __init__(self) -> None:
        self._image: Image | None = None
        self._version = (0, 0, 0)
        self._segments = Segments(0, False, [])

    def note(self, image: Image, version: tuple[int, int, int], segments: Segments) -> None:
        """`version`: the image's when the search began."""
        if segments.ends:
            self._image, self._version, self._segments = image, version, segments

    def seek(self, image: Image, offset: int, *, data: bool) -> int | None:
        """See `Segments.seek`. None also if it is known no longer."""
        return self._segments.seek(offset, data=data) if self._holds(image) else None

    def find(self, image: Image, offset: int, *, data: bool) -> Segments | None:
        """What `find_segments` would find, if it is known."""
        segments = self._segments
        index = bisect_right(segments.ends, offset)
        if not self._holds(image) or offset < segments.start or index == len(segments.ends):
            return None
        rest = Segments(offset, segments.is_data ^ bool(index & 1), segments.ends[index:])
        wanted = 1 if not rest.is_data else 0 if data else 2
        return rest if len(rest.ends) >= wanted or rest.ends[-1] == image.size else None

    def _holds(self, image: Image) -> bool:
        return image is self._image and image.version == self._version
