"""What moving in and out costs: `python -m tests.bench.moving` (as root, for the file systems of the reflinks).

A disk of 10 GiB with 2 GiB of data, and one of 100 GiB with 20,000 runs of 64 KiB, become QED images and raw disks
again, each way by copying, sharing and in place. Seconds include a sync; the space is what the file system has less
afterwards, with the source still there. Medians over the rounds; the ways take turns.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from tests.bench import memory, qemu_root
from tests.bench.report import machine
from tests.bench.targets import QedFuse, run

GIB = 1 << 30
_RUN = 64 << 10


@dataclass(frozen=True)
class Disk:
    """`runs`: how many pieces of data it has, spread evenly, each of `length` bytes."""

    title: str
    size: int
    runs: int
    length: int

    def fill(self, path: Path) -> None:
        content = random.randbytes(self.length)
        step = self.size // self.runs
        with path.open("wb") as file:
            for number in range(self.runs):
                file.seek(number * step // _RUN * _RUN)
                file.write(number.to_bytes(8, "little") + content[8:])
            file.truncate(self.size)
            os.fsync(file.fileno())


DISKS = (
    Disk("10 GiB, 2 GiB of data", 10 * GIB, 64, 32 << 20),
    Disk("100 GiB, 20,000 runs of 64 KiB", 100 * GIB, 20_000, _RUN),
)


@dataclass(frozen=True)
class Way:
    """`shares`: needs a file system that can share blocks. The command is given source, target and their formats."""

    title: str
    command: Callable[[Path, Path, str, str], Sequence[str | Path]]
    shares: bool = False
    in_place: bool = False


def _copying(*tool: str) -> Callable[[Path, Path, str, str], Sequence[str | Path]]:
    return lambda source, target, old, new: (*tool, "-f", old, "-O", new, source, target)


def ways(roots: Sequence[Path]) -> list[Way]:
    ours = (*QedFuse.tool, "convert")
    others = [Way("qemu-img convert", _copying("qemu-img", "convert"))]
    for root in roots:
        version = qemu_root.peers(root)[0].version
        tool = qemu_root.program(root.resolve(), "qemu-img")
        others.append(Way(f"qemu-img convert {qemu_root.dotted(version)}", _copying(*tool, "convert")))
    return [
        *others,
        Way("qedfuse convert --reflink=never", _copying(*ours, "--reflink=never")),
        Way("qedfuse convert, XFS", _copying(*ours, "--reflink=always"), shares=True),
        Way(
            "qedfuse convert --in-place",
            lambda source, _target, old, new: (*ours, "--in-place", "-f", old, "-O", new, source),
            in_place=True,
        ),
    ]


@contextmanager
def sharing(directory: Path) -> Iterator[Path]:
    """An XFS in a file, mounted."""
    device, mountpoint = directory / "xfs", directory / "mnt"
    run("truncate", "-s", "300G", device)
    run("mkfs.xfs", "-q", device)
    mountpoint.mkdir()
    run("mount", "-o", "loop", device, mountpoint)
    try:
        yield mountpoint
    finally:
        run("umount", mountpoint)
        device.unlink()


def _used(directory: Path) -> int:
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def move(way: Way, source: Path, target: Path, old: str, new: str) -> tuple[float, float]:
    """Seconds, and MiB that are used afterwards and were not before."""
    run("sync", "-f", source)
    before = _used(source.parent)
    memory.have_at_hand()
    started = time.monotonic()
    run(*way.command(source, target, old, new))
    run("sync", "-f", source)
    return time.monotonic() - started, (_used(source.parent) - before) / (1 << 20)


Figures = dict[tuple[str, str], dict[str, list[tuple[float, float]]]]  # disk, direction -> way -> a pair a round


def measure(disk: Disk, way: Way, directory: Path, figures: Figures) -> None:
    """There and back."""
    source, target, back = directory / "source.raw", directory / "disk.qed", directory / "back.raw"
    try:
        disk.fill(source)
        figures[disk.title, "raw to QED"][way.title].append(move(way, source, target, "raw", "qed"))
        if way.in_place:
            source.rename(target)
        figures[disk.title, "QED to raw"][way.title].append(move(way, target, back, "qed", "raw"))
    finally:
        for path in (source, target, back):
            path.unlink(missing_ok=True)


def markdown(figures: Figures, titles: Sequence[str]) -> str:
    lines = ["| disk | direction | " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(titles)]
    for (disk, direction), row in figures.items():
        cells = [_cell(row[title]) if row.get(title) else "-" for title in titles]
        lines.append(f"| {disk} | {direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(pairs: Sequence[tuple[float, float]]) -> str:
    seconds = statistics.median(seconds for seconds, _space in pairs)
    space = statistics.median(space for _seconds, space in pairs)
    return f"{seconds:.3g} s, {space:,.0f} MiB"


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--qemu-root", "roots", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--scratch", type=click.Path(path_type=Path))
def main(rounds: int, roots: tuple[Path, ...], scratch: Path | None) -> None:
    """Measure all ways of moving in and out."""
    chosen = ways(roots)
    figures: Figures = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(dir=scratch) as directory, sharing(Path(directory)) as shared:
        for number in range(rounds):
            for disk in DISKS:
                for way in chosen if number % 2 == 0 else reversed(chosen):
                    measure(disk, way, shared if way.shares else Path(directory), figures)
                    click.echo(f"round {number + 1}: {disk.title}: {way.title}", err=True)
    click.echo(f"{machine()}; {rounds} rounds.\n\n{markdown(figures, [way.title for way in chosen])}")


if __name__ == "__main__":
    main()
