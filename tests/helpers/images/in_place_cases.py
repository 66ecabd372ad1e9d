"""Disks that are converted in place, between raw and QED, with all that matters for it; in RAM."""

from __future__ import annotations

from qedfuse.tools.in_place.apply import InPlace
from qedfuse.tools.in_place.plan import Wanted
from qedfuse.tools.in_place.qed_to_raw import QedToRaw
from qedfuse.tools.in_place.raw_to_qed import RawToQed
from tests.helpers.doubles.ram import RamFile, RamStorage
from tests.helpers.doubles.ram_journal import RamJournal
from tests.helpers.images.check_images import CLUSTER, TABLE, Builder
from tests.helpers.images.images import TINY, Chain, contents, new_chain, open_chain
from tests.helpers.judges.history import Clock, fill
from tests.helpers.judges.in_place import Case, again

SMALL = Wanted(CLUSTER, TABLE)


def raw_case(size: int, holes: tuple[int, ...] = ()) -> Case:
    """A raw disk with data, but for some clusters."""
    content = bytearray(fill(1, 0, size))
    for cluster in holes:
        start, end = cluster * CLUSTER, min((cluster + 1) * CLUSTER, size)
        content[start:end] = bytes(end - start)
    return Case(RawToQed(), "raw", "qed", RamFile.of(content), bytes(content), SMALL)


async def back_case(case: Case) -> Case:
    """The way back from what a raw disk has become."""
    storage = RamStorage("file", case.old.fork())
    await again(case, InPlace(storage, RamJournal(Clock()), case.converter, "raw", "qed"), None)
    return Case(QedToRaw(), "qed", "raw", storage.file, case.flat, exact=False)


async def written() -> Case:
    """The way back after the image has been used: written in place, zeroed, grown, and written behind its old end."""
    case = await back_case(raw_case(6 * CLUSTER + 512))
    image = await open_chain(Chain(case.old, []))
    await image.write(512, fill(2, 512, CLUSTER))
    await image.zero(2 * CLUSTER, CLUSTER)
    await image.resize(len(case.flat) + 9 * CLUSTER)
    await image.write(len(case.flat) + 3 * CLUSTER, fill(3, 0, 2 * CLUSTER + 512))
    await image.write(len(case.flat) + 512, fill(4, 0, 512))
    await image.close()
    return Case(QedToRaw(), "qed", "raw", case.old, await contents(Chain(case.old, [])), exact=False)


async def in_any_order() -> Case:
    """An image whose clusters lie as they were written: backwards, with some never written, and one of zeroes."""
    chain = await new_chain(14 * CLUSTER + 512, TINY)
    image = await open_chain(chain)
    for cluster in (14, 9, 8, 7, 5, 4, 3, 1, 0):
        await image.write(cluster * CLUSTER, fill(cluster, 0, 512 if cluster == 14 else CLUSTER))
    await image.zero(8 * CLUSTER, CLUSTER)
    await image.close()
    return Case(QedToRaw(), "qed", "raw", chain.file, await contents(chain), exact=False)


async def with_leaks() -> Case:
    """Clusters that nothing refers to hold data where the disk must read as zeroes, and behind the header, too."""
    image = Builder(12 * CLUSTER)
    image.raw[512:1024] = b"junk" * 128
    image.junk(3)
    image.data(image.table(0), 1, 9)
    file = RamFile.of(image.raw)
    return Case(QedToRaw(), "qed", "raw", file, await contents(Chain(file, [])), exact=False)


async def nothing_allocated() -> Case:
    chain = await new_chain(5 * CLUSTER, TINY)
    return Case(QedToRaw(), "qed", "raw", chain.file, bytes(5 * CLUSTER), exact=False)
