"""What goes where when a file's gaps are filled: the plans, carried out on a model of a file, come to a dense file."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedfuse.check import compaction
from qedfuse.check.compaction import Layout, Moves, plan
from qedfuse.native._clustermap import Bitmap

#: A file: what each cluster in use holds, by its number. ("table", n, part) or ("data", n, 0).
Content = tuple[str, int, int]
File = dict[int, Content]


class Model:
    def __init__(self, first: int, table_size: int) -> None:
        self.first = first
        self.size = table_size
        self.file: File = {}
        self.batches = 0
        self.longest = 0

    def table(self, at: int, number: int) -> None:
        self.file.update({at + part: ("table", number, part) for part in range(self.size)})

    def layout(self) -> Layout:
        """A map of the file, whose end, as in a real one, may lie behind the last cluster in use."""
        clusters = max(self.file) + 1 + len(self.file) % 3
        used, tables = (Bitmap(clusters, self.first, 12, 4) for _ in range(2))
        for cluster, (kind, _, _) in self.file.items():
            used.mark(cluster, 1)
            if kind == "table":
                tables.mark(cluster, 1)
        return Layout(used, tables, self.first, self.size)

    def carry_out(self, moves: Moves, rng: random.Random) -> None:
        """In any order: what is a target is free before the batch, and no target twice."""
        pairs = list(zip(moves.sources, moves.targets, strict=True))
        assert all(self.file[source][0] == "data" for source, _ in pairs)
        assert all(one < other for one, other in pairwise(moves.sources))
        for start, target in moves.tables.items():
            assert [self.file[start + part] for part in range(self.size)] == [
                ("table", self.file[start][1], part) for part in range(self.size)
            ]
            pairs += [(start + part, target + part) for part in range(self.size)]
        assert len({target for _, target in pairs}) == len(pairs)
        assert not any(target in self.file or target < self.first for _, target in pairs)
        assert moves.end(self.size) == max(target for _, target in pairs) + 1
        rng.shuffle(pairs)
        self.longest = max(self.longest, moves.end(self.size))
        self.file.update({target: self.file[source] for source, target in pairs})
        for source, _ in pairs:
            del self.file[source]

    def fill(self, limit: int, rng: random.Random, *, cut: bool = False) -> None:
        before = sorted(self.file.values())
        while moves := plan(self.layout(), limit):
            if cut and len(moves.sources) > 1:
                moves.cut(rng.randint(1, len(moves.sources) - 1))
            self.carry_out(moves, rng)
            self.batches += 1
            assert self.batches < 10 + 20 * len(before), "it does not end"
        assert sorted(self.file.values()) == before
        assert sorted(self.file) == list(range(self.first, self.first + len(before)))


def some_file(rng: random.Random, table_size: int) -> Model:
    model = Model(rng.randint(1, 3), table_size)
    at = model.first
    gap, table, data = (rng.choice((0, 1, 5, 20)) for _ in range(3))
    for number in range(1, rng.randint(2, 61)):
        kind = rng.choices(("gap", "table", "data"), (gap, table, data + 1))[0]
        length = rng.choice((1, 1, 2, table_size - 1, table_size, table_size + 1, 3 * table_size))
        if kind == "table":
            model.table(at, number)
            at += table_size
        elif kind == "data":
            model.file.update({at + step: ("data", number, step) for step in range(length)})
            at += length
        else:
            at += length
    model.table(at, 0)  # there is always one
    return model


@settings(max_examples=600, deadline=None)
@given(st.integers(0, 1 << 40), st.sampled_from([1, 2, 4, 16]), st.sampled_from([1, 7, 40, 10000]))
def test_every_file_becomes_dense(seed: int, table_size: int, limit: int) -> None:
    rng = random.Random(seed)
    some_file(rng, table_size).fill(limit, rng, cut=rng.random() < 0.3)


def dense(model: Model, words: str) -> Model:
    """T a table, d data, . a gap, from the first cluster on."""
    at = model.first
    for number, word in enumerate(words):
        if word == "T":
            model.table(at, number)
            at += model.size
        else:
            if word == "d":
                model.file[at] = ("data", number, 0)
            at += 1
    return model


@pytest.mark.parametrize(
    ("words", "batches", "longest"),
    [
        ("Tdd..ddddd", 1, 0),
        ("T....dddT", 1, 0),
        ("T.d.d.T", 3, 1),  # make a slot, use it, fill what the table leaves
        ("T.d.dTdd", 1, 0),
        ("T..dddddTT.TT", 3, 1),
        (".T", 2, 4),  # a table that only has to go one further down takes the way round
        (".dTTTTT", 3, 20),  # and all of them must
    ],
)
def test_how_much_is_done_at_a_time(words: str, batches: int, longest: int) -> None:
    """`longest`: by how many clusters the file grows on the way."""
    model = dense(Model(1, 4), words)
    end = max(model.file) + 1
    model.fill(1000, random.Random(1))
    assert (model.batches, max(0, model.longest - end)) == (batches, longest)


def test_data_is_moved_once() -> None:
    """The last clusters go into the first gaps, and only as many as it takes."""
    rng = random.Random(3)
    model = dense(Model(1, 4), "T" + "".join(rng.choice("d.") for _ in range(5000)))
    layout = model.layout()
    behind = layout.behind
    assert behind == sum(cluster >= layout.end for cluster in model.file) > 1000
    moved = 0
    while moves := plan(model.layout(), 300):
        assert len(moves.sources) <= 300
        assert min(moves.sources) >= layout.end > max(moves.targets)
        assert max(moves.sources) == max(model.file)
        model.carry_out(moves, rng)
        moved += len(moves.sources)
    assert moved == behind


def test_runs_are_kept_together() -> None:
    model = dense(Model(1, 4), "T" + "d" * 10 + "." * 100 + "d" * 50)
    moves = plan(model.layout(), 1000)
    assert list(moves.runs(1000)) == [(115, 15, 50)]
    assert list(moves.runs(20)) == [(115, 15, 20), (135, 35, 20), (155, 55, 10)]
    assert moves.target(120) == 20
    moves.cut(3)
    assert list(moves.runs(1000)) == [(115, 15, 3)]


def test_tables_without_end_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving nearly all tables of a file because of one gap: not if there are more than memory is for."""
    monkeypatch.setattr(compaction, "MAX_TABLES", 10)
    assert plan(dense(Model(1, 4), "." + "T" * 9).layout(), 1000)
    assert not plan(dense(Model(1, 4), "." + "T" * 30).layout(), 1000)
