"""Offset arithmetic of a QED image: guest offsets, clusters, tables and pages of tables. Pure.

A guest offset splits, from the low bits up, into the offset in the cluster, the index in the L2 table and the index
in the L1 table. Tables are handled in pages of 4 KiB (512 entries): every legal table is a whole number of pages.

Source: QEMU docs/interop/qed_spec, "Cluster offset translation".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qedfuse.sizes import ENTRY_SIZE, MAX_OFFSET, PAGE_SIZE, is_power_of_two

MIN_CLUSTER_SIZE = 4 << 10
MAX_CLUSTER_SIZE = 64 << 20
DEFAULT_CLUSTER_SIZE = 64 << 10
MIN_TABLE_SIZE = 1
MAX_TABLE_SIZE = 16
DEFAULT_TABLE_SIZE = 4


#: L2 entry values that are no offsets.
UNALLOCATED = 0
ZERO_CLUSTER = 1


@dataclass(frozen=True)
class Geometry:
    """The two sizes that give an image its shape.

    cluster_size: bytes, a power of 2 from 4 KiB to 64 MiB. table_size: clusters, a power of 2 from 1 to 16.
    """

    cluster_size: int = DEFAULT_CLUSTER_SIZE
    table_size: int = DEFAULT_TABLE_SIZE

    def __post_init__(self) -> None:
        if not is_power_of_two(self.cluster_size) or not MIN_CLUSTER_SIZE <= self.cluster_size <= MAX_CLUSTER_SIZE:
            raise ValueError(
                f"cluster size {self.cluster_size} is not a power of two between {MIN_CLUSTER_SIZE} and "
                f"{MAX_CLUSTER_SIZE}"
            )
        if not is_power_of_two(self.table_size) or not MIN_TABLE_SIZE <= self.table_size <= MAX_TABLE_SIZE:
            raise ValueError(
                f"table size {self.table_size} is not a power of two between {MIN_TABLE_SIZE} and {MAX_TABLE_SIZE}"
            )

    @cached_property
    def cluster_bits(self) -> int:
        return self.cluster_size.bit_length() - 1

    @cached_property
    def table_bytes(self) -> int:
        return self.table_size * self.cluster_size

    @cached_property
    def table_entries(self) -> int:
        return self.table_bytes // ENTRY_SIZE

    @cached_property
    def table_pages(self) -> int:
        """Pages of 4 KiB in one table."""
        return self.table_bytes // PAGE_SIZE

    @cached_property
    def table_page_bits(self) -> int:
        return self.table_pages.bit_length() - 1

    @cached_property
    def l2_coverage(self) -> int:
        """Guest bytes that one L2 table maps."""
        return self.table_entries * self.cluster_size

    @cached_property
    def max_image_size(self) -> int:
        """Bytes; what two levels of tables can map, and a signed 64-bit offset can name."""
        return min(self.table_entries * self.l2_coverage, MAX_OFFSET)

    def clusters_for(self, size: int) -> int:
        """Clusters that `size` bytes need."""
        return -(-size >> self.cluster_bits)

    def is_place(self, offset: int, size: int, start: int, end: int) -> bool:
        """Whether a run of clusters or a table, `size` bytes, can lie at `offset` of a file whose header ends at
        `start` and whose clusters end at `end`. This is what makes an entry valid; C has the same in layer.c and
        clustermap.c."""
        return start <= offset <= end - size and not offset & (self.cluster_size - 1)

    def start_of_cluster(self, offset: int) -> int:
        return offset & -self.cluster_size
