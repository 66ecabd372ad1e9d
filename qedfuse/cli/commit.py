"""`qedfuse commit`."""

from __future__ import annotations

import signal
import sys
from functools import partial

import click

from qedfuse.cli.no_space import reads_as_before
from qedfuse.cli.params import backing_options, backing_policy, cache_hint, file_name, format_option
from qedfuse.cli.progress import Bar, Percentage
from qedfuse.cli.until_signal import until_signal
from qedfuse.errors import EXIT_OK


@click.command(
    epilog="-t CACHE is accepted as a hint without effect. A commit that was interrupted leaves FILE reading as "
    "before: run it again. Until then the base holds a mixture of old and new."
)
@format_option
@click.option("-d", "keep", is_flag=True, help="Do not empty FILE.")
@click.option(
    "-b",
    "base",
    metavar="BASE",
    type=file_name,
    help="Commit into this file further down the chain, and the layers between, too. Those read as something else "
    "then. Implies -d.",
)
@click.option("-p", "percentage", is_flag=True, help="Show progress on stdout, as qemu-img does.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@cache_hint("-t", "cache")
@backing_options
@click.argument("file", type=file_name)
def commit(
    keep: bool,
    base: str | None,
    percentage: bool,
    quiet: bool,
    backing_root: str | None,
    no_backing: bool,
    file: str,
) -> int:
    """Write what the image FILE has into its backing file, raw or qed, and empty FILE; it reads the same as before.

    The backing file becomes at least as large as FILE. Other images over it are changed with it.
    """
    import trio

    from qedfuse.tools.commit import commit_image

    bar = Percentage() if percentage and not quiet else Bar("committing", sys.stderr.isatty() and not quiet)
    policy = backing_policy(backing_root, no_backing)
    job = partial(commit_image, file, base, keep=keep, policy=policy, progress=bar)
    try:
        outcome = trio.run(until_signal, job, reads_as_before(file))
    finally:
        bar.close()
    if isinstance(outcome, signal.Signals):
        return 128 + outcome
    if not quiet:
        click.echo("Image committed.")
    return EXIT_OK
