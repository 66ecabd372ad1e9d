"""The range lock against a model: who holds what follows from the claims that are there, in the order of asking.

A claim holds its range exactly if no earlier claim that is still there, held or waiting, conflicts with it. So nothing
overtakes what it conflicts with, nothing waits for what has gone, and readers share.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from qedfuse.qed.range_lock import FOREVER, RangeLock

#: Few clusters, so that most ranges meet.
CLUSTERS = 6


@dataclass(eq=False)
class Claim:
    start: int
    end: int
    exclusive: bool
    holds: bool = False
    release: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def conflicts(self, other: Claim) -> bool:
        shared = {*range(self.start, min(self.end, CLUSTERS))} & {*range(other.start, min(other.end, CLUSTERS))}
        return bool(shared) and (self.exclusive or other.exclusive)


class World:
    """Tasks that hold claims on one lock, and the model: the claims in the order of asking."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.lock = RangeLock()
        self.claims: list[Claim] = []

    async def _hold(self, claim: Claim, task_status: trio.TaskStatus[None]) -> None:
        with claim.scope:
            task_status.started()  # no checkpoint up to the claim: tasks ask in the order in which they are started
            async with self.lock.hold(claim.start, claim.end, claim.exclusive):
                claim.holds = True
                others = [other for other in self.claims if other.holds and other is not claim]
                assert not any(other.conflicts(claim) for other in others), "two hold what they must not share"
                try:
                    await claim.release.wait()
                finally:
                    claim.holds = False

    async def ask(self, claim: Claim) -> None:
        self.claims.append(claim)
        await self.nursery.start(self._hold, claim)

    def leave(self, claim: Claim, *, cancelled: bool) -> None:
        """By itself, once it holds its range, or cancelled, be it that it holds it or that it waits."""
        if cancelled:
            claim.scope.cancel()
        else:
            claim.release.set()

    async def compare(self) -> None:
        await wait_all_tasks_blocked()
        while left := [claim for claim in self._expected() if claim.release.is_set()]:
            self.claims = [claim for claim in self.claims if claim not in left]
        self.claims = [claim for claim in self.claims if not claim.scope.cancel_called]
        assert [claim for claim in self.claims if claim.holds] == self._expected()
        assert bool(self.lock) == bool(self.claims)

    def _expected(self) -> list[Claim]:
        """The claims that hold their range."""
        here = [claim for claim in self.claims if not claim.scope.cancel_called]
        return [
            claim
            for position, claim in enumerate(here)
            if not any(earlier.conflicts(claim) for earlier in here[:position])
        ]


#: Of a claim: where it begins, how many clusters it has (0: all behind), whether it is exclusive.
ASK = st.tuples(st.just("ask"), st.integers(0, CLUSTERS - 1), st.integers(0, 3), st.booleans())
#: Of the claims that are there the one of this number, modulo how many there are.
LEAVE = st.tuples(st.sampled_from(["release", "cancel"]), st.integers(0, 9), st.just(0), st.just(False))
#: Steps between which nothing else runs, and such groups one after the other.
STEPS = st.lists(st.lists(st.one_of(ASK, LEAVE), min_size=1, max_size=4), max_size=25)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_claims_are_granted_as_the_model_says(groups: list[list[tuple[str, int, int, bool]]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery)
            for group in groups:
                for kind, number, length, exclusive in group:
                    if kind == "ask":
                        end = number + length if length else FOREVER
                        await world.ask(Claim(number, end, exclusive))
                    elif world.claims:
                        world.leave(world.claims[number % len(world.claims)], cancelled=kind == "cancel")
                await world.compare()
            for claim in list(world.claims):
                world.leave(claim, cancelled=False)
            await world.compare()
            assert not world.claims and not world.lock

    trio.run(main)


def test_a_reader_does_not_overtake_a_writer_that_waits() -> None:
    """The example: readers that come again and again would keep the writer waiting for ever."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery)
            reader, writer, late, elsewhere = (
                Claim(0, 2, False),
                Claim(1, 3, True),
                Claim(2, 4, False),
                Claim(4, 5, True),
            )
            for claim in (reader, writer, late, elsewhere):
                await world.ask(claim)
            await world.compare()
            assert (reader.holds, writer.holds, late.holds, elsewhere.holds) == (True, False, False, True)
            world.leave(writer, cancelled=True)
            await world.compare()
            assert late.holds, "what waited for a claim that is withdrawn goes on"
            nursery.cancel_scope.cancel()

    trio.run(main)
