"""`qedfuse compare`."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

import click

from qedfuse.chain.format_probe import FORMATS
from qedfuse.cli.in_use import share_hint
from qedfuse.cli.params import backing_options, backing_policy, file_name
from qedfuse.cli.progress import Bar, Percentage
from qedfuse.errors import EXIT_OK, EXIT_USAGE

if TYPE_CHECKING:
    from qedfuse.tools.compare import Comparison

EXIT_DIFFERENT = 1

_FORMATS = click.Choice(FORMATS)


@click.command(
    epilog=f"Exit codes: {EXIT_OK} identical, {EXIT_DIFFERENT} different, {EXIT_USAGE} an image cannot be opened "
    "(also: wrong usage), 3 its tables cannot be read, 4 its data cannot be read."
)
@click.option("-f", "first_format", type=_FORMATS, help="FIRST's format; probed if not given.")
@click.option("-F", "second_format", type=_FORMATS, help="SECOND's format; probed if not given.")
@click.option("-p", "percentage", is_flag=True, help="Show progress on stdout, as qemu-img does.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only: the exit code tells.")
@click.option(
    "-s", "strict", is_flag=True, help="Different, too: other sizes, or other parts that are stored, zeroes, or absent."
)
@click.option("-T", "cache", expose_value=False, hidden=True)
@click.option(
    "-U", "--force-share", "share", is_flag=True, help="Compare images even if another process is writing them."
)
@backing_options
@click.argument("first", type=file_name)
@click.argument("second", type=file_name)
def compare(
    first_format: str | None,
    second_format: str | None,
    percentage: bool,
    quiet: bool,
    strict: bool,
    share: bool,
    backing_root: str | None,
    no_backing: bool,
    first: str,
    second: str,
) -> int:
    """Tell whether the disks in FIRST and SECOND (raw, qed or qcow2, with their backing files) have the same content.

    What the larger one has more must be zeroes, unless -s is given.
    """
    import trio

    from qedfuse.tools.compare import compare_images

    bar = Percentage() if percentage and not quiet else Bar("comparing", sys.stderr.isatty() and not quiet)
    job = partial(
        compare_images,
        first,
        second,
        one_format=first_format,
        other_format=second_format,
        strict=strict,
        share=share,
        policy=backing_policy(backing_root, no_backing),
        progress=bar,
    )
    try:
        with share_hint():
            found = trio.run(job)
    finally:
        bar.close()
    if not quiet:
        click.echo("\n".join(_describe(found)))
    return EXIT_OK if found.difference is None else EXIT_DIFFERENT


def _describe(found: Comparison) -> list[str]:
    """In qemu-img's words, which scripts look for."""
    from qedfuse.tools.compare import Difference

    if found.difference is Difference.SIZE:
        return ["Strict mode: Image size mismatch!"]
    is_behind_one = found.difference is None or found.offset >= min(found.sizes)
    lines = ["Warning: Image size mismatch!"] if found.sizes[0] != found.sizes[1] and is_behind_one else []
    if found.difference is None:
        lines.append("Images are identical.")
    elif found.difference is Difference.STATUS:
        lines.append(f"Strict mode: Offset {found.offset} block status mismatch!")
    else:
        lines.append(f"Content mismatch at offset {found.offset}!")
    return lines
