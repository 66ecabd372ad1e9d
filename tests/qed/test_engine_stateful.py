"""The engine against a plain byte array: random operations, tiny clusters, every kind of backing file, cold tables."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import trio
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qedfuse.qed import file_growth as growing
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.image import Image
from qedfuse.qed.table_pages import PagePool
from qedfuse.sizes import round_up
from tests.helpers.doubles.ram import Chaos, RamFile, RamStorage
from tests.helpers.images.images import (
    POOL,
    TINIEST,
    TINY,
    Chain,
    assert_qemu_agrees,
    checked,
    contents,
    new_chain,
    open_chain,
    raw_file,
)

CLUSTER = 4096
MAX_SIZE = 5 << 20  # three L2 tables of TINIEST, two of TINY
#: So few pages that nearly every look-up is cold.
SMALL_POOL = PagePool(capacity=2)


def pattern(seed: int, size: int) -> bytes:
    """Bytes that differ everywhere; none of them zero."""
    return bytes(random.Random(seed).choices(range(1, 256), k=min(size, 1021))) * (size // 1021 + 1)


#: Where it hurts: cluster and table borders, and a little beside them.
def offsets(limit: int = MAX_SIZE) -> st.SearchStrategy[int]:
    borders = st.sampled_from([0, CLUSTER, 2 << 20, 4 << 20, 1 << 20])
    near = st.builds(
        lambda border, clusters, bytes_: max(0, border + clusters * CLUSTER + bytes_),
        borders,
        st.integers(-3, 6),
        st.sampled_from([0, 0, 0, 1, -1, 512, 4095, 1000, -512]),
    )
    return st.one_of(near, near, st.integers(0, limit)).filter(lambda offset: offset <= limit)


sizes = st.one_of(
    st.sampled_from([1, 511, 512, CLUSTER, 2 * CLUSTER, 3 * CLUSTER + 5, 5 * CLUSTER]), st.integers(1, 60_000)
)
long_sizes = st.one_of(sizes, st.integers(1, MAX_SIZE))


class ImageMachine(RuleBasedStateMachine):
    finished: ClassVar[int] = 0
    seen_by_qemu: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.image: Image | None = None

    def do(self, function: Callable[..., Awaitable[Any]], *arguments: object) -> Any:
        return trio.run(function, *arguments)

    @initialize(
        geometry=st.sampled_from([TINY, TINY, TINIEST]),
        size=offsets(),
        backing=st.sampled_from(["none", "none", "short", "long", "qed"]),
        backing_size=st.integers(1, 40 * CLUSTER),
        seed=st.one_of(st.none(), st.integers(0, 1000)),
        small_pool=st.booleans(),
        punches=st.booleans(),
        growth=st.sampled_from([0, growing._GROW_CLUSTERS]),
    )
    def make(
        self,
        geometry: Geometry,
        size: int,
        backing: str,
        backing_size: int,
        seed: int | None,
        small_pool: bool,
        punches: bool,
        growth: int,
    ) -> None:
        growing._GROW_CLUSTERS, self.growth_before = growth, growing._GROW_CLUSTERS
        self.chaos = None if seed is None else Chaos(seed)
        self.pool = SMALL_POOL if small_pool else POOL
        self.punches = punches
        self.geometry = geometry
        size = round_up(size, 512)
        below: list[tuple[RamFile, str]] = []
        flat = b""
        if backing != "none":
            if backing == "short":
                backing_size = min(backing_size, max(1, size - 1))
            if backing == "long":
                backing_size = min(MAX_SIZE, size + backing_size)
            flat = pattern(7, backing_size)[:backing_size]
            flat = flat[:CLUSTER] + bytes(max(0, min(len(flat), 2 * CLUSTER) - CLUSTER)) + flat[2 * CLUSTER :]
            below = [(raw_file(flat), "raw")]
        if backing == "qed":
            below, flat = self.do(self.make_middle, below, flat)
        self.below_before = [file.key() for file, _kind in below]
        self.chain: Chain = self.do(new_chain, size, geometry, below)
        self.model = bytearray(flat[:size].ljust(size, b"\0"))
        self.window = (0, size)
        self.freed = False
        self.open()

    async def make_middle(
        self, below: list[tuple[RamFile, str]], flat: bytes
    ) -> tuple[list[tuple[RamFile, str]], bytes]:
        """A QED image over the raw one: longer, with data, zeroes and nothing."""
        size = round_up(len(flat), 512) + 3 * CLUSTER
        middle = await new_chain(size, TINY, below)
        model = bytearray(flat.ljust(size, b"\0"))
        image = await open_chain(middle)
        for offset, length in ((512, 100), (size - 2 * CLUSTER, 2 * CLUSTER)):
            await image.write(offset, b"\xaa" * length)
            model[offset : offset + length] = b"\xaa" * length
        await image.zero(3 * CLUSTER, 2 * CLUSTER)
        model[3 * CLUSTER : min(5 * CLUSTER, size)] = bytes(min(5 * CLUSTER, size) - 3 * CLUSTER)
        await image.close()
        return [*below, (middle.file, "qed")], bytes(model)

    def open(self) -> None:
        storage = RamStorage("image", self.chain.file, chaos=self.chaos, punches=self.punches)

        async def opening() -> Image:
            return await open_chain(self.chain, storage, pool=self.pool)

        self.image = self.do(opening)

    # -- operations ---------------------------------------------------------------------------------------------------

    @rule(offset=offsets(), size=sizes, seed=st.integers(0, 99), zeroes=st.sampled_from([False, False, False, True]))
    def write(self, offset: int, size: int, seed: int, zeroes: bool) -> None:
        """Past the end, too."""
        assert self.image
        data = bytes(size) if zeroes else pattern(seed, size)[:size]
        end = offset + size
        if end > len(self.model):
            event("write past the end")
            self.model.extend(bytes(round_up(end, 512) - len(self.model)))
        if not self.image.write_nowait(offset, data):
            self.do(self.image.write, offset, data)
        self.model[offset:end] = data
        self.window = (offset, size)

    @rule(offset=offsets(), size=long_sizes)
    def zero(self, offset: int, size: int) -> None:
        assert self.image
        self.freed = True
        self.do(self.image.zero, offset, size)
        end = min(offset + size, len(self.model))
        if offset < end:
            self.model[offset:end] = bytes(end - offset)
        self.window = (offset, size)

    @rule(offset=offsets(), size=long_sizes)
    def discard(self, offset: int, size: int) -> None:
        """Whole clusters only; the image's last one counts as whole if the range reaches the end."""
        assert self.image
        self.freed = True
        self.do(self.image.discard, offset, size)
        first = round_up(offset, CLUSTER)
        end = min(offset + size, len(self.model))
        if end < len(self.model):
            end -= end % CLUSTER
        if first < end:
            self.model[first:end] = bytes(end - first)
        self.window = (offset, size)

    @rule(size=offsets(), shift=st.sampled_from([None, None, -1, 1, -CLUSTER, CLUSTER]))
    def resize(self, size: int, shift: int | None) -> None:
        assert self.image
        if shift is not None:
            size = max(0, len(self.model) + shift)
        old = len(self.model)
        self.do(self.image.resize, size)
        asked, size = size, round_up(size, 512)
        self.freed |= size < old
        event("shrink" if size < old else "grow")
        self.model[asked:] = bytes(max(0, old - asked))
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))
        self.window = (max(0, min(old, size) - 2 * CLUSTER), 4 * CLUSTER)

    @rule()
    def flush(self) -> None:
        assert self.image
        self.do(self.image.flush)
        assert not self.image.failed

    @rule()
    def write_back(self) -> None:
        assert self.image
        self.do(self.image.write_back)

    @rule()
    def clean(self) -> None:
        """What an idle image does."""
        assert self.image
        self.do(self.image.clean)
        assert not self.image.header.needs_check

    @rule(again=st.booleans(), size=st.integers(1, MAX_SIZE))
    def put_something_else_below(self, again: bool, size: int) -> None:
        """The same once more, by another name; below an image that has nothing a file of zeroes, or away with that."""
        assert self.image
        below = self.chain.below
        if not below:
            below = [(RamFile(size=round_up(size, 512)), "raw")]
        elif not again and not below[0][0].pages:
            below = []
        self.chain = Chain(self.chain.file, below)
        self.below_before = [file.key() for file, _kind in below]
        old = self.do(self.image.set_backing, self.chain.layer_below(), "another" if below else "")
        if old is not None:
            self.do(old.close)
        assert self.do(contents, self.chain) == self.model  # all was committed
        self.window = (0, 4 * CLUSTER)

    @rule(offset=offsets(MAX_SIZE + 10 * CLUSTER), size=long_sizes)
    def read(self, offset: int, size: int) -> None:
        assert self.image
        assert self.do(self.image.read, offset, size) == self.model[offset : offset + size]

    @rule()
    def reopen(self) -> None:
        self.close()
        self.open()

    def close(self) -> None:
        assert self.image
        image, self.image = self.image, None
        self.do(image.close)
        assert image.storage.closed  # type: ignore[attr-defined]
        result = self.do(checked, self.chain.file)
        assert result.corruptions == result.check_errors == 0, result.problems
        # Only where the host cannot punch, what is zeroed leaks.
        assert result.leaks == 0 or (self.freed and not self.punches), result.problems
        assert result.leaks or self.chain.file.size == result.image_end_offset, "clusters at the end that nobody needs"
        assert self.do(contents, self.chain) == self.model
        assert not image.header.needs_check

    # -- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def what_was_changed_reads_back(self) -> None:
        """The last operation's range and a cluster on either side (not all: most tables are to stay cold)."""
        if self.image is None:
            return
        offset, size = self.window
        start = max(0, offset - CLUSTER)
        end = offset + size + CLUSTER
        assert self.image.size == len(self.model)
        assert self.do(self.image.read, start, end - start) == self.model[start:end]

    def teardown(self) -> None:
        try:
            if self.image is not None:
                self.end()
        finally:
            growing._GROW_CLUSTERS = getattr(self, "growth_before", growing._GROW_CLUSTERS)

    def end(self) -> None:
        self.close()
        assert [file.key() for file, _kind in self.chain.below] == self.below_before
        if self.pool is SMALL_POOL:
            assert SMALL_POOL.in_use == 0
        cls = type(self)
        cls.finished += 1
        if self.geometry.table_size > 1 and cls.finished % 12 == 0:
            with tempfile.TemporaryDirectory() as directory:
                leaks = self.freed and not self.punches
                assert_qemu_agrees(self.chain, bytes(self.model), Path(directory), leaks=leaks)
            cls.seen_by_qemu += 1


ImageMachine.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    phases=[phase for phase in Phase if phase is not Phase.explain],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestImage = ImageMachine.TestCase


def test_qemu_has_seen_some() -> None:
    """Runs after the machine, in the order of the file."""
    assert ImageMachine.seen_by_qemu or not ImageMachine.finished
