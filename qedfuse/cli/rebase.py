"""`qedfuse rebase`."""

from __future__ import annotations

import signal
import sys
from functools import partial

import click

from qedfuse.chain.format_probe import FORMATS
from qedfuse.cli.no_space import reads_as_before
from qedfuse.cli.params import backing_options, backing_policy, cache_hint, file_name, format_option
from qedfuse.cli.progress import Bar, Percentage
from qedfuse.cli.until_signal import until_signal
from qedfuse.errors import EXIT_OK


@click.command(
    epilog="-t CACHE and -T CACHE are accepted as hints without effect. A rebase that was interrupted leaves FILE over "
    "its old backing file, reading as before: run it again."
)
@format_option
@click.option(
    "-b",
    "backing",
    metavar="NEW",
    help='The new backing file; a relative name is relative to FILE. "": FILE gets all that is below it, and stands '
    "alone.",
)
@click.option(
    "-F",
    "backing_format",
    type=click.Choice(FORMATS),
    help="NEW's format; probed if not given, but with -u it must be. What is raw now stays raw, whatever is written to "
    "it.",
)
@click.option(
    "-u",
    "--unsafe",
    "unsafe",
    is_flag=True,
    help="Change the name only, NEW need not exist: right if it is the old backing file, renamed; else FILE reads as "
    "something else. Without -b: FILE has no backing file any more.",
)
@click.option("-p", "percentage", is_flag=True, help="Show progress on stdout, as qemu-img does.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-U", "--force-share", "share", is_flag=True, help="Read NEW even if another process is writing it.")
@cache_hint("-t", "cache")
@cache_hint("-T", "source_cache")
@backing_options
@click.argument("file", type=file_name)
def rebase(
    backing: str | None,
    backing_format: str | None,
    unsafe: bool,
    percentage: bool,
    quiet: bool,
    share: bool,
    backing_root: str | None,
    no_backing: bool,
    file: str,
) -> int:
    """Put the image FILE over another backing file; it reads the same as before.

    What differs between the old backing file and NEW is copied into FILE.
    """
    if backing is None and not unsafe:
        raise click.UsageError('-b NEW is needed ("": none), or -u')
    if unsafe and backing and backing_format is None:
        raise click.UsageError("-u looks at no file: it needs NEW's format (-F)")
    import trio

    from qedfuse.tools.rebase import rebase_image, rename_backing

    policy = backing_policy(backing_root, no_backing)
    bar = Percentage() if percentage and not quiet else Bar("rebasing", sys.stderr.isatty() and not quiet)
    if unsafe:
        job = partial(rename_backing, file, backing or "", backing_format)
    else:
        job = partial(rebase_image, file, backing or "", backing_format, share=share, policy=policy, progress=bar)
    try:
        outcome = trio.run(until_signal, job, reads_as_before(file))
    finally:
        bar.close()
    return 128 + outcome if isinstance(outcome, signal.Signals) else EXIT_OK
