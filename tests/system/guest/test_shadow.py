"""The differential test's model says what is right, and finds what is wrong."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from tests.helpers.judges.parts import PAGE, Part
from tests.helpers.judges.shadow import SECTOR, Shadow, content, describe
from tests.helpers.mounts.diff_case import DiffCase
from tests.helpers.mounts.diff_image import Counts

SIZE = 16 * SECTOR


def written(shadow: Shadow, offset: int, size: int, *, cached: bool = False) -> bytes:
    """Write as worker 3 does; the contents of the sectors that it touches."""
    shadow.change(offset, content(3, shadow.note("write", offset, size), offset, size), cached=cached)
    first, end = offset // SECTOR * SECTOR, -(-(offset + size) // SECTOR) * SECTOR
    return bytes(shadow.model[first:end])


def test_a_read_is_compared_with_what_was_written_last() -> None:
    shadow = Shadow(bytearray(SIZE))
    first = written(shadow, 0, 2 * SECTOR)
    second = written(shadow, 100, 300)
    assert shadow.wrong(0, second + first[SECTOR:]) == []
    (fault,) = shadow.wrong(0, first)
    assert "sector 0" in fault and "worker 3's deed 1" in fault and "deed 2: write 100+300" in fault
    (fault,) = shadow.wrong(SECTOR, bytes(SECTOR))
    assert "sector 1: 512 of zeroes; not 512 of worker 3's deed 1" in fault


def test_after_a_crash_a_sector_is_one_of_its_contents_since_the_last_sync() -> None:
    for lost in range(3):
        shadow = Shadow(bytearray(SIZE))
        gone = written(shadow, 0, SECTOR)
        versions = [written(shadow, 0, SECTOR)]
        shadow.synced()
        versions += [written(shadow, 10, 20), written(shadow, 0, SECTOR)]
        assert len(shadow.settle(0, gone)) == 1
        shadow.model[0:SECTOR] = versions[-1]
        assert shadow.settle(0, versions[lost]) == []
        shadow.synced()
        assert shadow.wrong(0, versions[lost]) == []
        assert len(shadow.settle(0, versions[lost - 1])) == 1


@pytest.mark.parametrize("found", [bytes(SECTOR), b"\xff" * SECTOR, content(3, 1, SECTOR, SECTOR)])
def test_after_a_crash_nothing_else_is_right(found: bytes) -> None:
    shadow = Shadow(bytearray(SIZE))
    written(shadow, 0, 2 * SECTOR)
    shadow.synced()
    written(shadow, 0, 2 * SECTOR)
    assert len(shadow.settle(0, found)) == 1


def test_a_range_alone_can_be_durable() -> None:
    shadow = Shadow(bytearray(SIZE))
    data = written(shadow, 0, 3 * SECTOR)
    shadow.synced(SECTOR + 1, 2)
    assert shadow.settle(0, bytes(SECTOR) + data[SECTOR : 2 * SECTOR] + bytes(SECTOR)) == []
    assert len(shadow.settle(SECTOR, bytes(SECTOR))) == 1


def test_a_mixture_is_right_only_of_what_goes_through_the_page_cache() -> None:
    for cached in (False, True):
        shadow = Shadow(bytearray(SIZE))
        data = written(shadow, 0, SECTOR, cached=cached)
        assert len(shadow.settle(0, data[:256] + bytes(256))) == (not cached)
        assert shadow.mixed == cached


def test_bytes_tell_where_they_come_from() -> None:
    assert describe(content(2, 7, 1000, SECTOR), 1000) == "512 of worker 2's deed 7"
    moved = describe(content(2, 7, 4096, 256) + bytes(256), 0)
    assert moved == "256 of worker 2's deed 7 +4096 bytes away, 256 of zeroes"


def test_each_byte_belongs_to_one() -> None:
    for tail in (PAGE * 257, PAGE * 1000):
        size = tail + 12345
        ranges = sorted(place for mine in range(3) for place in Part(mine, 3, tail).all(size))
        assert ranges[0][0] == 0 and ranges[-1][1] == size
        assert all(one[1] == two[0] for one, two in itertools.pairwise(ranges))
        rnd = random.Random(1)
        assert all(Part(mine, 3, tail).pick(rnd, size) in ranges for mine in range(3) for _ in range(200))


class Damaged(DiffCase):
    """One byte of the image is another when it has been unmounted."""

    def _flat(self, image: Path) -> bytes:
        flat = bytearray(super()._flat(image))
        flat[len(flat) // 2] ^= 1
        return bytes(flat)


def test_a_byte_that_is_wrong_is_found(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"1 sectors are wrong: \[\d+\]"):
        Damaged(tmp_path, 1, "python", Counts()).run(rounds=1, count=40)
