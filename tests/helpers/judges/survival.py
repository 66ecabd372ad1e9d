"""What must hold for an image after a crash: it opens, every sector is accounted for, and it goes on working."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from qedfuse.layers.runs import Kind
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.image import Image
from tests.helpers.doubles.crash import CrashPoint, CrashStorage
from tests.helpers.doubles.ram import Chaos, RamFile, RamStorage
from tests.helpers.images.images import (
    POOL,
    TINY,
    Chain,
    assert_given_back,
    assert_sound,
    dump,
    new_chain,
    open_chain,
    raw_file,
    read_header,
)
from tests.helpers.judges.history import SECTOR, Guest, History, fill
from tests.helpers.qemu.cli import tool

#: What a state is judged bad for: its contents, its tables, guest data where a table is looked for.
BAD = (
    r"reads as|no cluster of the file|lies outside the file|no table of the file|used more than once|overlaps"
    r"|is not cluster-aligned"
)

#: Clusters; of a larger image only those that were touched are read.
WATCH_ALL = 64

Scenario = Callable[[Guest], Awaitable[None]]


@dataclass
class Run:
    """A scenario that was run on a logging storage, and the judge of every state that it could have been cut off in.

    `watched` are the guest's clusters that are read, all those of a small image; the others must stay unallocated.
    """

    chain: Chain
    history: History
    storage: CrashStorage
    geometry: Geometry
    watched: list[int] = field(default_factory=list)
    tried: int = 0
    complete_points: int = 0
    sampled_points: int = 0
    qemu_states: int = 0
    _seen: set[object] = field(default_factory=set)
    _good: set[tuple[int, bytes]] = field(default_factory=set)  # clusters that were found to be as expected
    _expected: tuple[int, list[list[set[bytes]]], set[int]] | None = None

    # -- running ------------------------------------------------------------------------------------------------------

    @classmethod
    async def of(
        cls,
        scenario: Scenario,
        *,
        size: int,
        below: list[tuple[RamFile, str]] | None = None,
        flat: bytes = b"",
        geometry: Geometry = TINY,
        chaos: Chaos | None = None,
        start: Chain | None = None,
    ) -> Run:
        """Run `scenario` on a fresh image over `below`, which reads as `flat` (or on `start`, which itself does)."""
        chain = start or await new_chain(size, geometry, below)
        history = History(flat[:size].ljust(size, b"\0"))
        storage = CrashStorage("image", chain.file.fork(), history, chaos=chaos)
        image = await open_chain(chain, storage)
        run = cls(chain, history, storage, geometry)
        await scenario(Guest(image, history, geometry.cluster_size))
        run.watch()
        return run

    def watch(self) -> None:
        """Choose what to read of each state; after the scenario."""
        sectors = self.geometry.cluster_size // SECTOR
        self.watched = sorted({number // sectors for number in self.history.sectors})
        largest = self.geometry.clusters_for(max(version.value for version in self.history.size.versions))
        if largest <= WATCH_ALL:
            self.watched = list(range(largest))
        # The whole cluster is watched: what is beside a write must not change.
        for cluster in self.watched:
            for number in range(cluster * sectors, (cluster + 1) * sectors):
                self.history.sector(number)

    # -- judging ------------------------------------------------------------------------------------------------------

    def expect(self, when: int) -> tuple[list[list[set[bytes]]], set[int]]:
        """For each watched cluster what its sectors may be, and what the image's size may be."""
        if self._expected is None or self._expected[0] != when:
            sectors = self.geometry.cluster_size // SECTOR
            clusters = [
                [self.history.sector(number).after_crash(when) for number in range(at * sectors, (at + 1) * sectors)]
                for at in self.watched
            ]
            self._good.clear()
            self._expected = (when, clusters, self.history.size.after_crash(when))
        return self._expected[1], self._expected[2]

    async def survive(self, file: RamFile, point: CrashPoint, *, thorough: bool = False) -> bool:
        """Judge one state; False if it was judged before. Raises AssertionError. The file is used up."""
        key = (file.key(), bisect_right(self.history.milestones, point.when))
        if key in self._seen:
            return False
        self._seen.add(key)
        self.tried += 1
        header = read_header(file)
        if header.has_backing_file or not header.needs_check:
            await assert_sound(file, leaks=True)
        if thorough:  # what somebody sees who must not repair it
            await self._compare(await self._read_only(file), point)
        image = await open_chain(self.chain.under(file))
        await self._compare(image, point)
        if thorough:
            await self._use(file, image)
        elif header.needs_check:
            await assert_given_back(file)
        return True

    async def _read_only(self, file: RamFile) -> Image:
        storage = RamStorage("image", file, writable=False)
        below = self.chain.under(file).layer_below()
        return Image(storage, read_header(file), below, writable=False, pool=POOL)

    async def _compare(self, image: Image, point: CrashPoint) -> None:
        clusters, sizes = self.expect(point.when)
        assert image.size in sizes, f"size {image.size} is none of {sizes}"
        step = self.geometry.cluster_size
        if len(self.watched) == self.watched[-1] + 1:  # all from 0 on
            whole = bytes(await image.read(0, len(self.watched) * step))
            found = [whole[start : start + step] for start in range(0, len(whole), step)]
        else:
            found = [bytes(await image.read(at * step, step)) for at in self.watched]
        for index, data in enumerate(found):
            if (index, data) not in self._good:
                self._compare_cluster(self.watched[index], data, clusters[index])
                self._good.add((index, data))
        if image.size <= len(found) * step:
            return
        offset = 0
        while offset < image.size:
            for kind, length, _host in await image.map(offset, image.size - offset):
                first, last = offset // step, -(-(offset + length) // step)
                if kind is Kind.ZERO:  # as what was nothing before reads anyway
                    last = min(last, -(-self.history.initial_data // step))
                if kind is not Kind.UNALLOCATED:
                    strange = set(range(first, last)).difference(self.watched)
                    assert not strange, f"guest clusters {strange} were never touched but are mapped"
                offset += length

    def _compare_cluster(self, at: int, data: bytes, expected: list[set[bytes]]) -> None:
        for position in range(0, len(data), SECTOR):
            found = data[position : position + SECTOR]
            possible = expected[position // SECTOR]
            assert found in possible, (
                f"guest sector {(at * self.geometry.cluster_size + position) // SECTOR} reads as {found[:16]!r}, "
                f"not as one of {sorted(value[:16] for value in possible)}"
            )

    async def _use(self, file: RamFile, image: Image) -> None:
        """Write, free, flush, read, close: and all that was not written is as it was."""
        step = self.geometry.cluster_size
        size = image.size
        model = {at: bytearray(await image.read(at * step, step)) for at in self.watched if at * step < size}
        for number, (at, data) in enumerate(model.items()):
            if number % 3 == 2:
                await image.discard(at * step, step)
                if len(data) == step or (at + 1) * step >= size:
                    data[:] = bytes(len(data))
            else:
                part = fill(0xAF7E4, at * step, 2 * SECTOR)[: len(data)]
                await image.write(at * step, part)
                data[: len(part)] = part
            if number % 3 == 1:
                await image.flush()
        await image.flush()
        for at, data in model.items():
            assert await image.read(at * step, step) == data, f"after the crash cluster {at} reads as something new"
        await image.close()
        await assert_sound(file, leaks=True)
        fresh = await self._read_only(file)
        assert not fresh.header.needs_check
        for at, data in model.items():
            assert await fresh.read(at * step, step) == data, f"after a second opening cluster {at} reads as another"
        await fresh.close()

    async def ask_qemu(self, file: RamFile, directory: Path) -> None:
        """QEMU opens the state (and repairs it, if it is unclean), finds nothing wrong and reads what we read."""
        self.qemu_states += 1
        chain = self.chain.under(file)
        path = chain.dump(directory)
        header = read_header(file)
        if header.needs_check and not chain.below:
            tool("qemu-io", "-f", "qed", "-c", "read 0 512", path)
        tool("qemu-img", "check", "-f", "qed", path, status=(0, 3))
        flat = directory / "flat.raw"
        tool("qemu-img", "convert", "-f", "qed", "-O", "raw", path, flat)
        image = await open_chain(chain)
        with flat.open("rb") as theirs:
            for start in range(0, image.size, 1 << 20):
                assert await image.read(start, 1 << 20) == theirs.read(1 << 20)
        assert flat.stat().st_size == image.size
        # And we agree on what it repaired.
        if header.needs_check:
            dump(file, directory / "ours")
            tool("qemu-img", "check", "-f", "qed", directory / "ours", status=(0, 3))
            tool("qemu-img", "compare", "-f", "qed", "-F", "raw", directory / "ours", flat)

    async def enumerate(
        self, rnd: random.Random, *, complete: int, samples: int, directory: Path | None = None, ask_qemu: int = 3
    ) -> None:
        """All states of the points that have at most `complete` of them; of the others as many of `samples` as fall to
        each point, drawn at random. `directory`: let QEMU judge `ask_qemu` states, too."""
        points = list(self.storage.crash_points())
        large = sum(point.count > complete for point in points)
        for_qemu = set(rnd.sample(range(len(points)), min(ask_qemu, len(points)))) if directory else set()
        for number, point in enumerate(points):
            if point.count <= complete:
                self.complete_points += 1
                states = point.every_state()
            else:
                self.sampled_points += 1
                states = (point.some_state(rnd) for _ in range(max(4, samples // large)))
            for file in states:
                await self.survive(file, point, thorough=rnd.random() < 0.1)
            if number in for_qemu and directory:
                await self.ask_qemu(point.some_state(rnd), directory)


def raw_below(size: int) -> tuple[list[tuple[RamFile, str]], bytes]:
    """A raw backing file with no sector like another, and its contents."""
    flat = fill(0xBACC, 0, size)
    return [(raw_file(flat), "raw")], flat
