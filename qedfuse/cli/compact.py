"""`qedfuse compact`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from qedfuse.cli.in_use import name_mount
from qedfuse.cli.params import file_name, format_option, output_option, show_size, to_json
from qedfuse.cli.progress import Bar
from qedfuse.errors import EXIT_FAILED, EXIT_OK
from qedfuse.text import printable

if TYPE_CHECKING:
    from qedfuse.tools.compact import Compaction


@click.command(
    epilog=f"Exit codes: {EXIT_OK} done, {EXIT_FAILED} not an image, in use or corrupt, and nothing is changed; or no "
    "space, and what was done until then stays."
)
@format_option
@output_option
@click.option("--dry-run", is_flag=True, help="Change nothing; tell how short the file would get.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.argument("image", type=file_name)
def compact(output: str, dry_run: bool, quiet: bool, image: str) -> int:
    """Make IMAGE's file as short as what it holds: leaked and free clusters go.

    The file's last clusters are moved to where nothing is in use. What a guest reads stays the same, at every instant:
    it may be interrupted, and run again to go on.
    """
    from qedfuse.host.waiting import run_blocking
    from qedfuse.tools.compact import compact_image

    bar = Bar("compacting", sys.stderr.isatty() and not quiet)
    try:
        with name_mount():
            done = run_blocking(compact_image(image, dry_run=dry_run, progress=bar))
    finally:
        bar.close()
    if output == "json":
        click.echo(to_json(_to_json(image, done), indent=4))
    elif not quiet:
        click.echo(f"{printable(image)}: {_describe(done)}")
    return EXIT_OK


def _to_json(image: str, done: Compaction) -> dict[str, object]:
    result: dict[str, object] = {
        "filename": image,
        "format": "qed",
        "dry-run": done.held_after is None,
        "file-size-before": done.size_before,
        "file-size-after": done.size_after,
        "actual-size-before": done.held_before,
    }
    if done.held_after is not None:
        result["actual-size-after"] = done.held_after
    return result


def _describe(done: Compaction) -> str:
    before, after = (f"{show_size(size)} ({size} bytes)" for size in (done.size_before, done.size_after))
    if done.held_after is None:
        return f"{before} long, would get {after} long"
    if done.size_before == done.size_after:
        return f"{before} long, and cannot get shorter"
    return (
        f"was {before} long, is {after}; takes {show_size(done.held_after)} on the host, "
        f"before {show_size(done.held_before)}"
    )
