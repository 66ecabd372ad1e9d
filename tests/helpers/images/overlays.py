"""Chains of any formats and sizes, for commands that change an overlay: drawn by Hypothesis, made by QEMU."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from tests.helpers.images.conversions import flat, make_chain, qemu_finds_no_error

KIB = 1 << 10
#: Bytes; few and close, so that ends meet, and no multiples of a cluster.
_SIZES = st.sampled_from([512, 40 * KIB, 256 * KIB, 256 * KIB + 512, 600 * KIB, 1024 * KIB + 1536])
_GEOMETRIES = st.sampled_from(["cluster_size=4k,table_size=2", "cluster_size=64k,table_size=4", "cluster_size=1M"])


@dataclass(frozen=True)
class Shape:
    """Layers, bottom first, as (format, size). `options` are for QED, `seed` for what is in them."""

    layers: tuple[tuple[str, int], ...]
    options: str
    seed: int

    def make(self, directory: Path) -> Path:
        """In a directory of its own. Returns the top one."""
        directory.mkdir()
        return make_chain(directory, *self.layers, seed=self.seed, options=self.options)


@st.composite
def shapes(
    draw: st.DrawFn, *, bottom: tuple[str, ...] = ("raw", "qed", "qcow2"), top: str = "", most: int = 3
) -> Shape:
    """`top`: the format of the uppermost layer, which is one more then."""
    lowest = draw(st.tuples(st.sampled_from(bottom), _SIZES))
    upper = draw(st.lists(st.tuples(st.sampled_from(["qed", "qcow2"]), _SIZES), max_size=most - 1))
    last = [(top, draw(_SIZES))] if top else []
    return Shape((lowest, *upper, *last), draw(_GEOMETRIES), draw(st.integers(1, 1 << 20)))


def copied(directory: Path) -> Path:
    """The same files, in another directory beside it."""
    other = directory.with_name(directory.name + "-copy")
    shutil.copytree(directory, other)
    return other


def content(image: Path) -> bytes:
    """What QEMU reads, and that it finds nothing wrong."""
    if image.suffix == ".qed":
        qemu_finds_no_error(image)
    return flat(image).read_bytes()
