"""Valid images in RAM with some words changed, and what is done with them. For Hypothesis and for the fuzzer.

The storage counts calls and refuses to be read where the file is not. The values put in are those that mean something
in a table: offsets of clusters of the file, its end, the limits of the numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from qedfuse.chain.recovery import recover
from qedfuse.check.check import Repair, check_image
from qedfuse.check.result import CheckResult
from qedfuse.errors import QedfuseError
from qedfuse.host.storage import Buffer
from qedfuse.layers.layer import Layer
from qedfuse.layers.mapping import map_image
from qedfuse.layers.raw import RawLayer
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import FEATURE_NEED_CHECK, HEADER_BYTES, Header
from qedfuse.qed.image import Image
from qedfuse.sizes import SECTOR_SIZE, round_up
from qedfuse.text import describe
from tests.helpers.doubles.ram import RamFile, RamStorage
from tests.helpers.images.images import POOL, Chain, new_chain, open_chain, raw_file

MIB = 1 << 20
#: Far above what the largest of these images needs, far below what would be felt.
MAX_CALLS = 50_000
MAX_SECONDS = 20

GEOMETRIES = [Geometry(4096, 1), Geometry(4096, 2), Geometry(4096, 16), Geometry(8192, 4)]

#: A change: the place's number, and how the word there is changed.
Change = tuple[int, tuple[str, int]]


class Fence(RamStorage):
    """A RAM file that counts what is asked of it, and is used only where it is, in whole sectors."""

    calls = 0

    def _count(self) -> None:
        self.calls += 1
        assert self.calls < MAX_CALLS, "too many calls"

    def _inside(self, offset: int, size: int) -> None:
        self._count()
        end = round_up(self.file.size, SECTOR_SIZE)
        assert 0 <= offset and offset + size <= end, f"{size} bytes at {offset:#x}, past the file's end"

    def read_into_nowait(self, offset: int, target: memoryview) -> bool:
        self._inside(offset, len(target))
        return super().read_into_nowait(offset, target)

    async def read_into(self, offset: int, target: memoryview) -> None:
        self._inside(offset, len(target))
        await super().read_into(offset, target)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self._inside(offset, len(data))
        return super().write_nowait(offset, data)

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._inside(offset, sum(map(len, buffers)))
        await super().write(offset, buffers)

    async def punch(self, offset: int, size: int) -> None:
        self._inside(offset, size)
        await super().punch(offset, size)

    async def truncate(self, size: int) -> None:
        self._count()
        await super().truncate(size)

    async def sync(self) -> None:
        self._count()
        await super().sync()

    def next_data(self, offset: int) -> int | None:
        self._count()
        return super().next_data(offset)

    def next_hole(self, offset: int) -> int:
        self._count()
        return super().next_hole(offset)


@dataclass
class Victim:
    """A valid image, and the offsets of the words that are worth changing: the header's, and those in use in tables."""

    chain: Chain
    places: list[int]


BASE = raw_file(b"base" * 40_000)


async def make_victim(geometry: Geometry, backing: bool) -> Victim:
    below = [(BASE, "raw")] if backing else None
    chain = await new_chain(3 * MIB, geometry, below)
    image = await open_chain(chain)
    cluster = geometry.cluster_size
    await image.write(0, b"a" * 5 * cluster)
    await image.write(MIB + 512, b"b" * 3 * cluster)
    await image.write(3 * MIB - cluster, b"c" * cluster)
    await image.flush()
    await image.zero(cluster, cluster)
    await image.discard(3 * cluster, cluster)
    await image.close()
    places = [*range(0, HEADER_BYTES, 4)]
    l1 = image.header.l1_table_offset
    tables = [l1, *(entry for entry in table(chain.file, l1, geometry) if entry)]
    for offset in tables:
        entries = table(chain.file, offset, geometry)
        used = [index for index, entry in enumerate(entries) if entry]
        places += [offset + 8 * index for index in sorted({*used, 0, 1, len(entries) - 1, *(i + 1 for i in used[-1:])})]
    return Victim(chain, [place for place in places if place < chain.file.size])


def table(file: RamFile, offset: int, geometry: Geometry) -> tuple[int, ...]:
    return struct.unpack(f"<{geometry.table_entries}Q", file.read(offset, geometry.table_bytes))


async def make_victims() -> list[Victim]:
    return [await make_victim(geometry, backing) for geometry in GEOMETRIES for backing in (False, True)]


#: Values at which numbers change their meaning.
LIMITS = [0, 1, 2, 3, 511, 512, 4095, 4096, 1 << 26, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 4096, 1 << 63]
LIMITS += [(1 << 64) - 4096, (1 << 64) - 512, (1 << 64) - 1]


def mutate(victim: Victim, how: list[Change], size: tuple[str, float] | None, dirty: bool) -> RamFile:
    """A copy of the victim's file with words changed."""
    file = victim.chain.file.fork()
    cluster = Header.decode(file.read(0, HEADER_BYTES), "").cluster_size
    for number, (kind, value) in how:
        place = victim.places[number % len(victim.places)]
        width = 4 if place < 16 or 56 <= place < HEADER_BYTES else 8
        old = int.from_bytes(file.read(place, width), "little")
        if kind == "cluster":
            value = (file.size // cluster + value if value < 0 else value) * cluster
        elif kind == "copy":
            value = int.from_bytes(file.read(victim.places[value % len(victim.places)], 8), "little")
        elif kind == "flip":
            value = old ^ 1 << value
        file.write(place, (value % (1 << 8 * width)).to_bytes(width, "little")[: max(0, file.size - place)])
    if dirty:
        features = int.from_bytes(file.read(16, 8), "little") | FEATURE_NEED_CHECK
        file.write(16, features.to_bytes(8, "little"))
    if size is not None:
        file.truncate(int(file.size * size[1]) if size[0] == "cut" else max(file.size, int(size[1])))
    return file


class Trial:
    """What is done with one mutant. `errors`: lines of the errors it gave."""

    def __init__(self, victim: Victim, file: RamFile) -> None:
        self.victim = victim
        self.file = file
        self.errors: list[str] = []

    async def attempt(self, action: Callable[[], Awaitable[object]]) -> object:
        try:
            return await action()
        except OSError as error:
            line = describe(error, "image")
            assert line and "\n" not in line
            self.errors.append(line)
            return None

    def header(self, storage: RamStorage) -> Header | None:
        try:
            header = Header.decode(storage.file.read(0, HEADER_BYTES), "image")
            header.validate_file_size(storage.file.size, "image")
        except QedfuseError as error:
            self.errors.append(describe(error))
            return None
        return header

    def below(self, header: Header) -> Layer | None:
        """What lies below it by its header now."""
        if not header.has_backing_file:
            return None
        return self.victim.chain.layer_below() or RawLayer.open(RamStorage("below", BASE, writable=False))

    async def look(self) -> None:
        """Check, map and read it; nothing is written."""
        storage = Fence("image", self.file, writable=False)
        header = self.header(storage)
        if header is None:
            return
        await self.attempt(lambda: check_image(storage, header))
        image = Image(storage, header, self.below(header), writable=False, pool=POOL)
        for at in offsets(image):
            await self.attempt(lambda at=at: image.read(at, 20_000))  # type: ignore[misc]
            await self.attempt(lambda at=at: image.map(at, min(MIB, image.size - at)))  # type: ignore[misc]
        await self.attempt(lambda: first_entries(image))
        await image.close()

    async def use(self) -> None:
        """Open it for writing, as `open_image` does, and do all there is to do."""
        storage = Fence("image", self.file)
        header = self.header(storage)
        if header is None:
            return
        recovered = await self.attempt(lambda: recover(storage, header))
        if not isinstance(recovered, Header):
            return
        image = Image(storage, recovered, self.below(recovered), writable=True, pool=POOL)
        await self.change(image)
        await self.attempt(image.close)

    async def change(self, image: Image) -> None:
        size = image.size
        for at in offsets(image):
            data = at.to_bytes(8, "little") * 300
            if await self.attempt(lambda at=at, data=data: write(image, at, data[: size - at])):  # type: ignore[misc]
                assert await image.read(at, len(data)) == data[: size - at]
            await self.attempt(lambda at=at: image.zero(at + 700, 9000))  # type: ignore[misc]
        await self.attempt(image.flush)
        await self.attempt(lambda: image.discard(0, MIB))
        await self.attempt(image.flush)
        for at in offsets(image):
            await self.attempt(lambda at=at: image.write(at, b"again" * 1000))  # type: ignore[misc]
        await self.attempt(image.flush)
        await self.attempt(lambda: image.resize(max(0, image.size - MIB)))
        await self.attempt(lambda: image.resize(size))
        await self.attempt(lambda: image.write(image.size, b"end"))

    async def repair(self) -> bool:
        """Whether a repair was possible; then it must have been a good one."""
        storage = Fence("image", self.file)
        header = self.header(storage)
        if header is None:
            return False
        result = await self.attempt(lambda: check_image(storage, header, repair=Repair.ALL))
        if not isinstance(result, CheckResult):
            return False
        assert result.corruptions == 0 and result.check_errors == 0, result.problems
        after = await check_image(Fence("image", self.file, writable=False), result.header)
        assert (after.corruptions, after.leaks, after.need_check) == (0, 0, False), after.problems
        return True


async def write(image: Image, at: int, data: bytes) -> bool:
    await image.write(at, data)
    return True


async def first_entries(image: Image) -> None:
    async with aclosing(map_image(image)) as entries:
        number = 0
        async for _entry in entries:
            number += 1
            if number > 2000:
                break


def offsets(image: Image) -> list[int]:
    step = image.geometry.cluster_size
    places = [0, step, 3 * step + 100, MIB, 2 * MIB + 5, image.size // 2, image.size - 512]
    return sorted({place for place in places if 0 <= place < image.size})
