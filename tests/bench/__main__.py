"""The benchmark: `python -m tests.bench` (as root, for the guest and cold rows).

Every round runs each row on each target, one after the other, so that a noisy machine hurts all alike; figures are
medians over the rounds and ratios within this run. Nothing is tuned for a target, and every row with fsync syncs.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import click

from tests.bench import measures, memory, qemu_root, report, targets, workloads


class Run:
    """The rows that are measured, the targets, and what has come of it so far."""

    def __init__(self, rows: Sequence[workloads.Row], kinds: Sequence[type[targets.Target]]) -> None:
        self.rows = rows
        self.kinds = kinds
        self.results: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.failures: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)

    def round(self, number: int, directory: Path, context: measures.Context) -> None:
        for row in self.rows:
            for kind in self.kinds if number % 2 == 0 else reversed(self.kinds):
                if not row.takes(kind):
                    continue
                target = kind(directory)
                memory.have_at_hand()
                try:
                    figure = row.measure(target, context)
                except Exception as error:  # one row's failure must not cost the others
                    reason = (str(error) or repr(error)).splitlines()[0].replace(f"{directory}/", "")
                    self.failures[kind.name, reason][row.title] += 1
                    click.echo(f"round {number + 1}: {row.title}: {kind.name}: failed: {error}", err=True)
                    continue
                finally:
                    target.image.unlink(missing_ok=True)
                self.results[row.title][kind.name].append(figure)
                click.echo(f"round {number + 1}: {row.title}: {kind.name}: {figure:,.3g} {row.unit}", err=True)


def choose(served: Sequence[str], roots: Sequence[Path]) -> tuple[list[type[targets.Target]], list[str]]:
    """The targets that are measured, and which are left out and why."""
    offered, left_out = list(targets.ALL), []
    after_peer = offered.index(targets.StorageDaemon) + 1
    for root in roots:
        try:
            offered[after_peer:after_peer] = qemu_root.peers(root)
        except (OSError, RuntimeError, ValueError) as error:
            raise click.ClickException(f"--qemu-root {root}: {error}") from error
    if not roots:
        left_out.append("another QEMU: no --qemu-root")
    chosen = []
    for kind in offered:
        if served and not any(word in kind.name for word in served):
            continue
        reason = kind.available()
        if reason:
            left_out.append(f"{kind.name}: {reason}")
        else:
            chosen.append(kind)
    return chosen, left_out


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often each row is measured.")
@click.option("--seconds", default=2.0, show_default=True, help="Length of a time-based row.")
@click.option("--row", "wanted", multiple=True, help="Only rows whose title contains this; may be repeated.")
@click.option("--target", "served", multiple=True, help="Only targets whose name contains this; may be repeated.")
@click.option(
    "--qemu-root",
    "roots",
    multiple=True,
    envvar="QEDFUSE_BENCH_QEMU_ROOT",
    show_envvar=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The root directory of a system with another QEMU, which takes part with one iothread and with two; may be "
    "repeated. tests/bench/qemu_root.sh makes one. qedfuse is compared with the newest.",
)
@click.option(
    "--scratch", type=click.Path(path_type=Path), help="Where images live [default: the temporary directory]."
)
@click.option("--output", type=click.Path(path_type=Path), help="Write results.json, table.md and ratios.png here.")
@click.option("--tree", default="/usr/share/doc", show_default=True, type=click.Path(path_type=Path, exists=True))
def main(
    rounds: int,
    seconds: float,
    wanted: tuple[str, ...],
    served: tuple[str, ...],
    roots: tuple[Path, ...],
    scratch: Path | None,
    output: Path | None,
    tree: Path,
) -> None:
    """Run the table of workloads for the raw file, qemu-storage-daemon, nbdfuse and qedfuse side by side."""
    kinds, left_out = choose(served, roots)
    for text in left_out:
        click.echo(f"left out: {text}", err=True)
    run = Run([row for row in workloads.ROWS if not wanted or any(word in row.title for word in wanted)], kinds)
    names = [kind.name for kind in kinds]
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        source = Path(directory, "source.raw")
        with source.open("wb") as file:
            for _ in range(measures.SIZE >> 20):
                file.write(random.randbytes(1 << 20))
            os.fsync(file.fileno())
        context = measures.Context(seconds, source, tree)
        for number in range(rounds):
            run.round(number, Path(directory), context)
            table = report.markdown(run.rows, names, run.results, qemu_root.newest(kinds))
            head = f"{report.machine()}; {number + 1} rounds of {seconds:g} s."
            text = "\n\n".join(filter(None, [head, table, report.remarks(left_out, run.failures)])) + "\n"
            if output:
                output.mkdir(parents=True, exist_ok=True)
                (output / "results.json").write_text(json.dumps(run.results, indent=1))
                (output / "table.md").write_text(text)
    click.echo(text)
    if output:
        report.picture(run.rows, names, run.results, output / "ratios.png")


if __name__ == "__main__":
    main()
