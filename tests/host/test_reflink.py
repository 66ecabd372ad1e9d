"""Blocks that files share: what the host does, and what it says where it cannot."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfuse.host.reflink import NOT_SHARED, REFUSALS, SharedBytes, clone_range, shared_bytes
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.guests import run
from tests.helpers.mounts.hosts import host_of

MIB = 1 << 20
BLOCK = 4096


@pytest.fixture(scope="module", params=["btrfs", "xfs"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with host_of(request.param, tmp_path_factory.mktemp("host") / "disk", 400 * MIB) as point:
        yield point


@pytest.fixture
def pair(host: Path) -> Iterator[tuple[int, int]]:
    """A file of 1 MiB, and an empty one."""
    (host / "one").write_bytes(os.urandom(MIB))
    (host / "other").write_bytes(b"")
    one, other = (os.open(host / name, os.O_RDWR) for name in ("one", "other"))
    yield one, other
    os.close(one)
    os.close(other)


def test_a_range_is_the_other_ones(host: Path, pair: tuple[int, int]) -> None:
    one, other = pair
    content = (host / "one").read_bytes()
    clone_range(other, 2 * BLOCK, one, BLOCK, MIB // 2)
    assert (host / "other").read_bytes() == bytes(2 * BLOCK) + content[BLOCK : BLOCK + MIB // 2]
    for name in ("one", "other"):
        run("sync", host / name)
    assert shared_bytes(other) == SharedBytes(MIB // 2, True)
    before = shared_bytes(one)
    assert before in (SharedBytes(MIB // 2, True), SharedBytes(MIB, True))  # btrfs: all of an extent is shared, or none
    os.pwrite(one, b"x" * BLOCK, BLOCK)
    assert os.pread(other, BLOCK, 2 * BLOCK) == content[BLOCK : 2 * BLOCK]
    os.fsync(one)
    assert shared_bytes(one).size == before.size - BLOCK


@pytest.mark.parametrize(
    ("offset", "start", "size"), [(512, 0, BLOCK), (0, 512, BLOCK), (0, 0, 512), (0, MIB, BLOCK), (0, 0, 2 * MIB)]
)
def test_what_is_no_range_of_blocks_is_refused(pair: tuple[int, int], offset: int, start: int, size: int) -> None:
    """Or does not lie in the source."""
    one, other = pair
    with raises_errno(*REFUSALS):
        clone_range(other, offset, one, start, size)
    assert os.fstat(other).st_size == 0


def test_of_two_file_systems(host: Path, pair: tuple[int, int], tmp_path: Path) -> None:
    with (tmp_path / "other").open("wb") as file, raises_errno(errno.EXDEV):
        clone_range(file.fileno(), 0, pair[0], 0, BLOCK)


def test_of_many_extents_not_all_are_told(host: Path) -> None:
    """It is a bound for the time, not for the file."""
    with (host / "many").open("wb+") as many, (host / "copy").open("wb") as copy:
        for number in range(1200):
            os.pwrite(many.fileno(), b"x" * BLOCK, 3 * number * BLOCK)
        os.fsync(many.fileno())
        clone_range(copy.fileno(), 0, many.fileno(), 0, 3 * 1199 * BLOCK)
        os.fsync(copy.fileno())
        found = shared_bytes(copy.fileno())
        assert 0 < found.size < 1199 * BLOCK
        assert not found.all


def test_of_what_has_none(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_bytes(b"x" * MIB)
    for name in ("empty", "full"):
        with (tmp_path / name).open("rb") as file:
            assert shared_bytes(file.fileno()) == NOT_SHARED
