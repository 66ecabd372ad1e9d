"""The benchmark: `python -m tests.bench` (as root, for the guest and cold rows).

Every round runs each row on each target, one after the other, so that a noisy machine hurts all alike; figures are
medians over the rounds and ratios within this run. Nothing is tuned for a target, and every row with fsync syncs.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections import defaultdict
from pathlib import Path

import click

from tests.bench import measures, report, targets, workloads


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often each row is measured.")
@click.option("--seconds", default=2.0, show_default=True, help="Length of a time-based row.")
@click.option("--row", "wanted", multiple=True, help="Only rows whose title contains this; may be repeated.")
@click.option("--target", "served", multiple=True, help="Only targets whose name contains this; may be repeated.")
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
    scratch: Path | None,
    output: Path | None,
    tree: Path,
) -> None:
    """Run the table of workloads for the raw file, qemu-storage-daemon, nbdfuse and qedfuse side by side."""
    rows = [row for row in workloads.ROWS if not wanted or any(word in row.title for word in wanted)]
    chosen = [kind for kind in targets.ALL if not served or any(word in kind.name for word in served)]
    for kind in list(chosen):
        reason = kind.available()
        if reason:
            click.echo(f"left out: {kind.name}: {reason}", err=True)
            chosen.remove(kind)
    names = [kind.name for kind in chosen]
    results: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        source = Path(directory, "source.raw")
        with source.open("wb") as file:
            for _ in range(measures.SIZE >> 20):
                file.write(random.randbytes(1 << 20))
            os.fsync(file.fileno())
        context = measures.Context(seconds, source, tree)
        for number in range(rounds):
            for row in rows:
                for kind in chosen if number % 2 == 0 else reversed(chosen):
                    if not row.takes(kind):
                        continue
                    target = kind(Path(directory))
                    try:
                        figure = row.measure(target, context)
                    except Exception as error:  # one row's failure must not cost the others
                        click.echo(f"round {number + 1}: {row.title}: {kind.name}: failed: {error}", err=True)
                        continue
                    finally:
                        target.image.unlink(missing_ok=True)
                    results[row.title][kind.name].append(figure)
                    click.echo(f"round {number + 1}: {row.title}: {kind.name}: {figure:,.3g} {row.unit}", err=True)
            table = report.markdown(rows, names, results)
            text = f"{report.machine()}; {number + 1} rounds of {seconds:g} s.\n\n{table}\n"
            if output:
                output.mkdir(parents=True, exist_ok=True)
                (output / "results.json").write_text(json.dumps(results, indent=1))
                (output / "table.md").write_text(text)
    click.echo(text)
    if output:
        report.picture(rows, names, results, output / "ratios.png")


if __name__ == "__main__":
    main()
