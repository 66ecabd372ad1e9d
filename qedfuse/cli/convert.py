"""`qedfuse convert`."""

from __future__ import annotations

import signal
import sys
from functools import partial

import click
from click.core import ParameterSource

from qedfuse.chain.format_probe import FORMATS
from qedfuse.cli.convert_in_place import convert_in_place, refuse_other_options
from qedfuse.cli.in_use import share_hint
from qedfuse.cli.params import (
    BACKING_OPTIONS,
    GEOMETRY_HELP,
    GEOMETRY_OPTIONS,
    backing_options,
    backing_policy,
    cache_hint,
    file_name,
    parse_backing,
    parse_geometry,
    parse_options,
    size_param,
    warn_of_objection,
)
from qedfuse.cli.progress import Bar, Percentage
from qedfuse.cli.until_signal import run_until_signal, until_signal
from qedfuse.errors import EXIT_OK
from qedfuse.host.waiting import NeedsEventLoopError

_FORMATS = click.Choice(FORMATS)
#: The values of `convert_sharing.Reflink`; the first is the default.
REFLINKS = ("auto", "always", "never")


def _no_compression(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        raise click.UsageError("-c: neither qed nor raw has compression")


#: An option of qemu-img's that says how to copy, not what: taken for the sake of scripts, and without effect.
_hint = partial(click.option, expose_value=False, hidden=True)


@click.command(
    epilog="-W, -C, -m N, -t CACHE, -T CACHE and --target-is-zero are accepted as hints without effect. The target is "
    "always durable on success."
)
@click.option("-f", "source_format", type=_FORMATS, help="SOURCE's format; probed if not given.")
@click.option(
    "-O", "target_format", type=click.Choice(["raw", "qed"]), default="raw", show_default=True, help="TARGET's format."
)
@click.option(
    "-o",
    "options",
    metavar="OPT,...",
    multiple=True,
    help=f"Of a new qed image: {GEOMETRY_HELP}, backing_file=, backing_fmt= (as -B, -F).",
)
@click.option(
    "-B",
    "backing",
    metavar="BACKING",
    help="A backing file for a new qed image, which then stores only what differs from it; a relative name is relative "
    "to TARGET.",
)
@click.option("-F", "backing_format", type=_FORMATS, help="BACKING's format; probed if not given.")
@click.option("-c", "compress", is_flag=True, expose_value=False, hidden=True, callback=_no_compression)
@click.option("-n", "no_create", is_flag=True, help="TARGET exists: fill it, and keep its size and what is behind.")
@click.option("-p", "percentage", is_flag=True, help="Show progress on stdout, as qemu-img does.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option(
    "-S",
    "sparse_size",
    type=size_param,
    metavar="SIZE",
    default="4k",
    show_default=True,
    help="So many zeroes in a row become a hole; 0: store everything.",
)
@click.option(
    "--reflink",
    type=click.Choice(REFLINKS),
    default=REFLINKS[0],
    show_default=True,
    help="Share blocks with SOURCE instead of copying them (btrfs, XFS): where that can be, or fail, or not at all.",
)
@click.option("-U", "--force-share", "share", is_flag=True, help="Copy SOURCE even if another process is writing it.")
@_hint("-W", "out_of_order", is_flag=True)
@_hint("-C", "copy_offload", is_flag=True)
@_hint("--target-is-zero", is_flag=True)
@_hint("-m", "coroutines", type=click.IntRange(1, 16))
@cache_hint("-t", "cache")
@cache_hint("-T", "source_cache")
@backing_options
@click.option("--in-place", is_flag=True, help="Convert FILE itself: its data stays where it is.")
@click.option("--undo", is_flag=True, help="With --in-place: take back a conversion that was interrupted.")
@click.option(
    "--force",
    is_flag=True,
    help="With --in-place: also if FILE has other names (hard links), or bitmaps, which get lost.",
)
@click.argument("source", type=file_name)
@click.argument("target", type=file_name, required=False)
@click.pass_context
def convert(
    context: click.Context,
    source_format: str | None,
    target_format: str,
    options: tuple[str, ...],
    backing: str | None,
    backing_format: str | None,
    no_create: bool,
    percentage: bool,
    quiet: bool,
    sparse_size: int,
    reflink: str,
    share: bool,
    backing_root: str | None,
    no_backing: bool,
    in_place: bool,
    undo: bool,
    force: bool,
    source: str,
    target: str | None,
) -> int:
    """Copy the disk in SOURCE (raw, qed or qcow2, with its backing files) to TARGET.

    A TARGET that exists is replaced, in place, unless somebody uses it. If that fails half-way, it is empty; a new
    TARGET is removed. A raw TARGET may be a block device.

    With --in-place SOURCE is FILE, which becomes the image: raw or qcow2 to qed, and qed to raw. Until one sector has
    been written it is what it was, from then on it is the new image; a journal beside it tells what is under way if the
    machine stops meanwhile, and the same command finishes it, or takes it back with --undo.
    """
    if in_place:
        refuse_other_options(context)
        explicit = context.get_parameter_source("target_format") is ParameterSource.COMMANDLINE
        return convert_in_place(
            source,
            source_format,
            target_format if explicit else None,
            options,
            undo=undo,
            force=force,
            bar=_bar(percentage, quiet),
        )
    if undo or force:
        raise click.UsageError(f"{'--undo' if undo else '--force'} is for --in-place")
    if target is None:
        raise click.UsageError("Missing argument 'TARGET'.")
    known = (*GEOMETRY_OPTIONS, *BACKING_OPTIONS) if target_format == "qed" else ()
    given = parse_options(target, options, known)
    backing, backing_format = parse_backing(given, backing, backing_format, "-B")
    if no_create and (given or backing is not None):
        raise click.UsageError("-n takes TARGET as it is: it excludes -o and -B")
    if backing is not None and target_format != "qed":
        raise click.UsageError("-B: a raw target has no backing file, only -O qed does")
    if backing is not None and no_backing:
        raise click.UsageError("--no-backing excludes -B")
    from qedfuse.tools.convert import convert_image
    from qedfuse.tools.convert_sharing import Reflink

    job = partial(
        convert_image,
        source,
        target,
        source_format=source_format,
        target_format=target_format,
        geometry=parse_geometry(target, given) if given else None,
        backing=backing,
        backing_format=backing_format,
        create=not no_create,
        sparse_size=sparse_size,
        share=share,
        reflink=Reflink(reflink),
        policy=backing_policy(backing_root, no_backing),
    )
    bar = _bar(percentage, quiet)
    job = partial(job, progress=bar, tell=bar.describe)
    try:
        try:  # loading an event loop takes longer than many conversions
            outcome = run_until_signal(job, share_hint(target=target))
        except NeedsEventLoopError:
            import trio

            outcome = trio.run(until_signal, job, share_hint(target=target))
    finally:
        bar.close()
    if isinstance(outcome, signal.Signals):
        return 128 + outcome
    if outcome is not None:
        warn_of_objection(target, outcome)
    return EXIT_OK


def _bar(percentage: bool, quiet: bool) -> Bar | Percentage:
    return Percentage() if percentage and not quiet else Bar("converting", sys.stderr.isatty() and not quiet)
