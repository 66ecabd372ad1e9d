"""A host whose system calls fail, are interrupted or transfer too little, once each: real calls on a mount of ours.

An interrupted call and a short transfer must change nothing at all; an error must be told, and do no harm.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from qedfuse import commit
from qedfuse.check import Repair
from qedfuse.opening import open_image
from tests.helpers.bad_host import SHORT, BadHost, Plan, bad_host
from tests.helpers.check_faults import Fault as Damage
from tests.helpers.check_faults import broken, dangling_where_copies_go, leaks_in_the_middle, many, tables_overlap
from tests.helpers.check_images import contents
from tests.helpers.check_tools import check_file, expect_no_worse, shared_with_tables
from tests.helpers.history import History
from tests.helpers.images import TINY, Chain, dump, new_chain
from tests.helpers.mounts import need_fuse
from tests.helpers.scenarios import BELOW, CLUSTER, SIZE, allocate, reuse, shrink_and_grow
from tests.helpers.survival import Scenario, raw_below
from tests.helpers.table_scenarios import TABLES, cut_tables
from tests.helpers.trials import StubbornGuest

#: What may happen to each kind of call; interrupted and short ones must go unnoticed.
WAYS = {
    "read": ["EIO", "EINTR", SHORT],
    "write": ["EIO", "ENOSPC", "EINTR", SHORT],
    "truncate": ["ENOSPC", "EINTR"],
    "sync": ["EIO", "EINTR"],
}
HARMLESS = ("EINTR", SHORT)


@pytest.fixture(autouse=True)
def growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file grows often."""
    monkeypatch.setattr(commit, "_GROW_CLUSTERS", 0)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BadHost]:
    need_fuse()
    with bad_host(tmp_path_factory.mktemp("bad") / "host") as host:
        yield host


class Session:
    """One run of a scenario on an image that lies on the bad host."""

    def __init__(self, host: BadHost, chain: Chain, flat: bytes) -> None:
        self.host = host
        self.path = dump(chain.file, host.path("image.qed"))
        self.history = History(flat)
        self.errors: list[OSError] = []
        self.guest: StubbornGuest | None = None
        self.calls: list[str] = []

    def run(self, scenario: Scenario, plan: Plan) -> None:
        async def main() -> None:
            try:
                async with open_image(self.path) as image:
                    self.guest = StubbornGuest(image, self.history, CLUSTER, errors=self.errors)
                    await scenario(self.guest)
                    await self.guest.close()
            except OSError as error:
                assert self.guest is None
                self.errors.append(error)

        self.host.arm(plan)
        trio.run(main, clock=MockClock())  # time stands still: no commits by the timer
        self.calls = self.host.disarm()

    def read_all(self) -> bytes:
        async def main() -> bytes:
            async with open_image(self.path) as image:
                return bytes(await image.read(0, image.size))

        return trio.run(main)


INJECTED: Counter[str] = Counter()


@pytest.mark.parametrize("backing", ["alone", "shorter"])
@pytest.mark.parametrize("scenario", [allocate, reuse, shrink_and_grow, cut_tables], ids=lambda s: s.__name__)
def test_every_system_call_fails_once(host: BadHost, tmp_path: Path, scenario: Scenario, backing: str) -> None:
    size = TABLES * TINY.l2_coverage if scenario is cut_tables else SIZE
    below, flat = raw_below(BELOW[backing]) if BELOW[backing] else ([], b"")
    flat = flat[:size].ljust(size, b"\0")
    chain = trio.run(new_chain, size, TINY, below)
    chain.dump(host.directory)
    fine = Session(host, chain, flat)
    fine.run(scenario, Plan())
    assert not fine.errors
    whole = fine.path.read_bytes()
    for number, kind in enumerate(fine.calls):
        for how in WAYS[kind]:
            session = Session(host, chain, flat)
            session.run(scenario, Plan(number, how))
            assert session.calls[number] == kind
            INJECTED[how] += 1
            try:
                judge(session, number, how, whole)
            except AssertionError as error:
                error.add_note(f"call {number}, {how}; around it: {fine.calls[max(0, number - 4) : number + 5]}")
                raise


def judge(session: Session, number: int, how: str, undisturbed: bytes) -> None:
    guest, kind = session.guest, session.calls[number]
    if how in HARMLESS:
        assert not session.errors
        assert session.path.read_bytes() == undisturbed
        return
    assert {error.errno for error in session.errors} <= {getattr(errno, how), errno.EIO if kind == "sync" else None}
    assert session.errors, "nobody was told"
    if guest is None:
        return
    assert not guest.lies
    assert bool(guest.image.failed) == (kind == "sync")
    if kind == "sync":
        assert "sync" not in session.calls[number + 1 :], "a second sync cannot make good for a failed one"
    result = check_file(session.path)
    assert result.corruptions == result.check_errors == 0, result.problems
    lost = guest.close_failed or kind == "sync"
    assert result.leaks == 0 or lost or guest.may_leak, result.problems
    guest.expect(session.read_all(), lost=lost)


@pytest.mark.parametrize("damage", [many, tables_overlap, dangling_where_copies_go, leaks_in_the_middle])
def test_every_system_call_of_a_repair_fails_once(host: BadHost, damage: Damage) -> None:
    """The host cannot punch: that is done by writing, and counts as leaked all the same."""
    raw = broken(damage)
    path = host.path("damaged.qed")
    before, shared = contents(raw), shared_with_tables(raw)

    def attempt(plan: Plan) -> tuple[int, list[str]]:
        """The errno, 0 if there was no error, and the calls."""
        path.write_bytes(raw)
        code = 0
        host.arm(plan)
        try:
            if check_file(path, Repair.ALL).check_errors:
                code = errno.EIO
        except OSError as error:
            code = error.errno or -1
        return code, host.disarm()

    code, calls = attempt(Plan())
    assert code == 0 and {"read", "write", "sync"} <= set(calls)
    whole = path.read_bytes()
    left = check_file(path).leaks
    tried = set()
    for number, kind in enumerate(calls):
        for how in WAYS[kind]:
            code, now = attempt(Plan(number, how))
            assert now[number] == kind
            INJECTED[how] += 1
            if how in HARMLESS:
                assert code == 0 and path.read_bytes() == whole
                continue
            assert code == getattr(errno, how)
            state = path.read_bytes()
            if state not in tried:
                tried.add(state)
                expect_no_worse(state, before, shared)
                result = check_file(path, Repair.ALL)
                assert (result.corruptions, result.leaks, result.check_errors) == (0, left, 0), result.problems


def test_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nsystem calls of a bad host: {INJECTED.total()} went wrong: {dict(INJECTED)}")
    assert not INJECTED or len(INJECTED) == 4
