"""What the benchmark says: a Markdown table and a picture of the ratios."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from tests.bench.workloads import Row

PEER = "qemu-storage-daemon"
RAW = "raw file"
OURS = "qedfuse"
_COLOURS = {RAW: "lightgrey", "nbdfuse": "tab:orange", OURS: "tab:green", f"{OURS} --no-fastpath": "tab:olive"}
_MORE_COLOURS = ("tab:blue", "tab:purple", "tab:cyan", "tab:pink")  # of further QEMUs
Results = Mapping[str, Mapping[str, Sequence[float]]]  # row title -> target name -> a figure a round


def ratio(row: Row, figures: Mapping[str, Sequence[float]], name: str, against: str = PEER) -> float | None:
    """How much better than the peer: above 1 is better, whatever the unit. None where either has no figure."""
    if not figures.get(name) or not figures.get(against):
        return None
    mine, theirs = statistics.median(figures[name]), statistics.median(figures[against])
    if not mine or not theirs:
        return None
    return mine / theirs if row.higher_is_better else theirs / mine


def spread(values: Sequence[float]) -> float:
    """Half the distance from the lowest to the highest, relative to the median."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / 2 / middle if middle else 0.0


def best_ratio(row: Row, figures: Mapping[str, Sequence[float]], peers: Sequence[str]) -> float | None:
    """The ratio of ours to the best of some peers; None where we have no figure, or none of them has."""
    ratios = [ratio(row, figures, OURS, peer) for peer in peers]
    return min((found for found in ratios if found is not None), default=None)


def markdown(rows: Sequence[Row], names: Sequence[str], results: Results, newest: tuple[str, Sequence[str]]) -> str:
    """Medians (± spread) and the ratio to the peer; what the newest QEMU is called, and as which targets it took part:
    how ours compares with the better of them."""
    version, peers = newest
    heads = [*names, *([f"{OURS} to {version}"] if peers else []), "bar"]
    lines = ["| workload | unit | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for row in rows:
        figures = results.get(row.title, {})
        cells = []
        for name in names:
            values = figures.get(name)
            if not values:
                cells.append("-")
                continue
            middle = statistics.median(values)
            against = ratio(row, figures, name)
            text = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
            share = f" **{against:.2f}x**" if against is not None else ""
            cells.append(f"{text} ±{spread(values):.0%}{share}")
        if peers:
            best = best_ratio(row, figures, peers)
            cells.append("-" if best is None else f"{best:.2f}x")
        lines.append(f"| {row.title} | {row.unit} | " + " | ".join(cells) + f" | {_bars(row, figures)} |")
    return "\n".join(lines)


def _bars(row: Row, figures: Mapping[str, Sequence[float]]) -> str:
    """What was promised, and by how much it was missed if it was."""
    parts = []
    for bar, against, text in ((row.bar, PEER, "x"), (row.raw_bar, RAW, " of raw")):
        reached = ratio(row, figures, OURS, against)
        if bar:
            missed = f" (**missed**: {reached:.2f})" if reached is not None and reached < bar else ""
            parts.append(f"{bar:g}{text}{missed}")
    if row.limit:
        ours = statistics.median(figures[OURS]) if figures.get(OURS) else None
        missed = f" (**missed**: {ours:.3g})" if ours is not None and ours > row.limit else ""
        parts.append(f"at most {row.limit:g} {row.unit}{missed}")
    return ", ".join(parts) or "-"


def remarks(left_out: Sequence[str], failures: Mapping[tuple[str, str], Counter[str]]) -> str:
    """What the table lacks: targets that took no part, and rows that failed in so many rounds, by target and reason."""
    lines = [f"- left out: {text}" for text in left_out]
    for (name, reason), rows in failures.items():
        titles = "; ".join(f"{title} ({times}x)" for title, times in rows.items())
        lines.append(f"- failed: {name}: {reason}: {titles}")
    return "\n".join(lines)


def machine() -> str:
    """What the figures were measured on."""
    qemu = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True, check=False).stdout
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return (
        f"Linux {platform.release()}, {os.cpu_count()} cores ({model}), Python {platform.python_version()}, "
        f"{qemu.splitlines()[0] if qemu else 'no qemu-storage-daemon'}"
    )


def picture(rows: Sequence[Row], names: Sequence[str], results: Results, path: Path) -> None:
    """A bar chart of ratios to the peer, log scale. Needs matplotlib (the `bench` extra)."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.bar and ratio(row, results.get(row.title, {}), PEER)]
    others = [name for name in names if name != PEER]
    colours = _COLOURS | dict(zip([name for name in others if name not in _COLOURS], cycle(_MORE_COLOURS)))
    figure = Figure(figsize=(11, 0.62 * len(shown) + 1.6), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(others)
    for position, name in enumerate(others):
        values = [ratio(row, results[row.title], name) or 1.0 for row in shown]  # no figure: no bar
        places = [index + (position - (len(others) - 1) / 2) * height for index in range(len(shown))]
        widths = [value - 1 for value in values]
        axes.barh(places, widths, height, left=1, color=colours[name], label=name)
    for index, row in enumerate(shown):
        axes.plot([row.bar, row.bar], [index - 0.4, index + 0.4], color="black", linewidth=1.5)
    axes.set_yticks(range(len(shown)), [row.title for row in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xscale("log")
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel(f"speed relative to {PEER}; right is faster (black mark: our bar)")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
