"""What a check of an image has found."""

from __future__ import annotations

from dataclasses import dataclass, field

from qedfuse.qed.header import Header

#: Lines that a result keeps.
MAX_PROBLEMS = 100


@dataclass
class CheckResult:
    """What a check found; after a repair, what is left.

    Names as in `qemu-img check --output=json`. `image_end_offset` (bytes) is the end of the last cluster in use,
    `total_clusters` what the image's size comes to, `allocated_clusters` the L2 entries with an offset,
    `fragmented_clusters` those of them that do not follow the one before. `check_errors` are tables that could not be
    read; leaks are not counted then, and nothing is repaired.

    `problems` are the first lines of all `problem_count`, found before a repair. `past_end_clusters` are allocated past
    the image's end, which is no fault. `cut_end`: up to where the file (bytes) would have to reach for the tables and
    clusters that begin inside and end behind it; 0 if there are none, as far as is known: `tables_not_followed` are L2
    tables that overlap something. `header` is the header that is in the file.
    """

    filename: str
    header: Header
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    check_errors: int = 0
    corruptions: int = 0
    corruptions_fixed: int = 0
    leaks: int = 0
    leaks_fixed: int = 0
    past_end_clusters: int = 0
    overlaps: int = 0
    cut_end: int = 0
    tables_not_followed: int = 0
    problems: list[str] = field(default_factory=list)
    problem_count: int = 0

    @property
    def need_check(self) -> bool:
        """Whether the image says that it was not closed cleanly."""
        return self.header.needs_check

    def note(self, problem: str, *, first: bool = False) -> None:
        """`first`: it must not be lost among many others."""
        self.problem_count += 1
        self.problems.insert(0 if first else len(self.problems), problem)
        del self.problems[MAX_PROBLEMS:]

    def to_json(self) -> dict[str, object]:
        """The keys of `qemu-img check --output=json`, all of them always, and ours."""
        return {
            "filename": self.filename,
            "format": "qed",
            "check-errors": self.check_errors,
            "image-end-offset": self.image_end_offset,
            "corruptions": self.corruptions,
            "corruptions-fixed": self.corruptions_fixed,
            "leaks": self.leaks,
            "leaks-fixed": self.leaks_fixed,
            "total-clusters": self.total_clusters,
            "allocated-clusters": self.allocated_clusters,
            "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": 0,
            "past-end-clusters": self.past_end_clusters,
            "need-check": self.need_check,
            "problems": self.problems,
            "problem-count": self.problem_count,
        }
