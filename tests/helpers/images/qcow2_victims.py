"""Small qcow2 images with some of everything, and what Hypothesis does to them."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from qedfuse.layers.qcow2.entries import compressed_extent
from tests.helpers.images.qcow2_images import be64, create, l1_offset, l2_offset, noise, qemu_io

#: Values for places (a fraction of all that are worth it), and where the file is cut off, as a fraction of its size.
Damage = tuple[list[tuple[float, bytes]], float | None]

DAMAGES = st.tuples(
    st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True), st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8))
        ),
        min_size=1,
        max_size=4,
    ),
    st.one_of(st.none(), st.floats(0, 1)),
)


class Victim:
    """A small image with everything in it, to be mutated, and the places worth it."""

    def __init__(self, directory: Path, cluster_size: int, compat: str) -> None:
        base = directory / "base.raw"
        base.write_bytes(noise(1 << 18))
        self.path = create(
            directory / f"{cluster_size}-{compat}.qcow2",
            1 << 20,
            f"cluster_size={cluster_size},compat={compat}",
            backing=base,
        )
        c = cluster_size
        qemu_io(self.path, f"write -P 1 0 {c}", f"write -c -P 2 {c} {c}", f"write -z {2 * c} {c}")
        self.bytes = self.path.read_bytes()
        stream, _size = compressed_extent(be64(self.path, l2_offset(self.path) + 8), cluster_size.bit_length() - 1)
        l1, l2 = l1_offset(self.path), l2_offset(self.path)
        table = be64(self.path, 48)
        block = be64(self.path, table)
        self.places = [*range(160), *range(l1, l1 + 16), *range(l2, l2 + 32), *range(stream, stream + 16)]
        self.places += [*range(table, table + 16), *range(block, block + 16)]

    def mutant(self, damage: Damage) -> bytes:
        """The image's bytes, damaged."""
        changes, cut = damage
        data = bytearray(self.bytes)
        for place, value in changes:
            at = self.places[int(place * len(self.places))]
            data[at : at + len(value)] = value
        return bytes(data if cut is None else data[: int(cut * len(data))])
