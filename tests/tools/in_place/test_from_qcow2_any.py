"""qcow2 images at random that become QED images where they are: those of QEMU, and those of whoever means harm."""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qedfuse.errors import QedfuseError
from qedfuse.host.chunks import unpack_entries
from qedfuse.layers.layer import Layer
from qedfuse.layers.qcow2.header import Qcow2Header
from qedfuse.layers.resolve import read_layer
from qedfuse.text import describe
from qedfuse.tools.in_place.apply import InPlace
from qedfuse.tools.in_place.plan import Wanted
from qedfuse.tools.in_place.qcow2_entries import translate
from qedfuse.tools.in_place.qcow2_refcounts import above_one, end_of_counts
from tests.helpers.doubles.image_ram import Ram
from tests.helpers.doubles.ram_journal import RamJournal
from tests.helpers.images.check_images import count
from tests.helpers.images.qcow2_images import COMPATS, create, noise, qemu_io
from tests.helpers.images.qcow2_in_place import expect_conversion, in_ram, open_in_ram
from tests.helpers.images.qcow2_victims import DAMAGES, Damage, Victim
from tests.helpers.judges.in_place import silent

KIB = 1 << 10
SIZE = 3000 * KIB
WANTED = Wanted(force=True)

#: Kind, first sector, how many.
Deed = tuple[str, int, int]

DEEDS = st.tuples(
    st.sampled_from(["write -P 1", "write -P 2", "write -z", "write -z -u", "discard"]),
    st.integers(0, SIZE // 512 - 1),
    st.integers(1, 700),
)


def commands(packed: set[int], deeds: list[Deed]) -> Iterator[str]:
    """For qemu-io: first what is compressed, which works where nothing has been written yet alone."""
    for number in packed:
        yield f"write -c -P {number} {number * 64}k 64k"
    for kind, start, length in deeds:
        yield f"{kind} {start * 512} {min(length, SIZE // 512 - start) * 512}"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cluster_bits=st.sampled_from([12, 13, 16]),
    compat=st.sampled_from(COMPATS),
    refcount_bits=st.sampled_from([1, 4, 16, 64]),
    backed=st.booleans(),
    packed=st.sets(st.integers(1, SIZE // 65536 - 1), max_size=5),
    deeds=st.lists(DEEDS, max_size=12),
)
def test_whatever_a_guest_did(
    tmp_path: Path,
    cluster_bits: int,
    compat: str,
    refcount_bits: int,
    backed: bool,
    packed: set[int],
    deeds: list[Deed],
) -> None:
    directory = Path(tempfile.mkdtemp(dir=tmp_path))
    base = directory / "base"
    base.write_bytes(noise(SIZE // 2))
    more = [f"refcount_bits={refcount_bits}"] if compat == "1.1" else []
    options = [f"cluster_size={1 << cluster_bits}", f"compat={compat}", *more]
    image = create(directory / "a.qcow2", SIZE, *options, backing=base if backed else None)
    if packed or deeds:
        qemu_io(image, *commands(packed, deeds))
    expect_conversion(image)
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def victims() -> Iterator[list[Victim]]:
    directory = Path(tempfile.mkdtemp(prefix="qcow2-victims-"))
    try:
        yield [Victim(directory, size, compat) for size in (4096, 65536) for compat in COMPATS]
    finally:
        shutil.rmtree(directory)


async def parts(layer: Layer) -> list[bytes]:
    try:
        places = {0, layer.size // 2, max(0, layer.size - 2000)}
        lengths = [(at, min(300 * KIB, layer.size - at)) for at in sorted(places)]
        return [bytes(await read_layer(layer, at, length)) for at, length in lengths if length]
    finally:
        await layer.close()


async def failure(work: InPlace) -> QedfuseError | None:
    """How a conversion fails, if it does."""
    try:
        await work.begin(WANTED, silent)
    except QedfuseError as error:
        return error
    return None


async def convert_mutant(data: bytes) -> bool:
    """Whether it became a QED image."""
    storage = Ram(data)
    journal = RamJournal(storage.clock)
    work = in_ram(storage, journal)
    error = await failure(work)
    assert journal.read() is None
    if error is not None:
        assert describe(error).startswith("ram.qed: ") and "\n" not in describe(error)
        assert work.ending == "ram.qed is unchanged"
        assert storage.raw == data
        return False
    below = noise(1 << 18)
    assert await parts(await open_in_ram(data, below)) == await parts(await open_in_ram(storage.raw, below))
    found = count(storage.raw)
    assert found.corruptions == found.unreferenced == 0
    return True


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 3), damage=DAMAGES)
def test_any_bytes(victims: list[Victim], which: int, damage: Damage) -> None:
    """A refusal, or an image that reads the same."""
    trio.run(convert_mutant, victims[which].mutant(damage))


def test_unharmed(victims: list[Victim]) -> None:
    """The victims do become images."""
    assert all(trio.run(convert_mutant, victim.bytes) for victim in victims)


ENTRIES = st.one_of(
    st.just(0),
    st.integers(1, 1 << 40).map(lambda cluster: 1 << 63 | cluster << 16 & (1 << 56) - 1),
    st.just(1),
    st.integers(0, (1 << 62) - 1).map(lambda entry: 1 << 62 | entry),
    st.integers(0, (1 << 64) - 1),
)


@given(entries=st.lists(ENTRIES, max_size=70))
def test_translate(entries: list[int]) -> None:
    """Entry by entry, it is what the format says."""
    header = Qcow2Header(3, 16, 1 << 40, 1 << 11, 65536, None, None)
    chunk = struct.pack(f">{len(entries)}Q", *entries)
    found, compressed = translate(chunk, header, 0, "image")
    expected = [0 if e >> 62 & 1 else e & 1 or e & 0x00FF_FFFF_FFFF_FE00 for e in entries]
    assert list(unpack_entries(found)) == expected
    assert compressed == [(number, e) for number, e in enumerate(entries) if e >> 62 & 1]


@given(order=st.integers(0, 6), data=st.data())
def test_reference_counts(order: int, data: st.DataObject) -> None:
    bits = 1 << order
    highest = (1 << bits) - 1
    counts = data.draw(st.lists(st.sampled_from(sorted({0, 1, 2 & highest, highest})), min_size=64, max_size=64))
    if bits < 8:
        whole = sum(value << bits * at for at, value in enumerate(counts))
        chunk = whole.to_bytes(64 * bits // 8, "little")
    else:
        chunk = b"".join(value.to_bytes(bits // 8, "big") for value in counts)
    assert list(above_one(chunk, bits)) == [(at, value) for at, value in enumerate(counts) if value > 1]
    used = [at for at, value in enumerate(counts) if value]
    assert -(-end_of_counts(chunk) // bits) == (used[-1] + 1 if used else 0)
