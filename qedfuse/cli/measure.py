"""`qedfuse measure`."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

import click

from qedfuse.chain.format_probe import FORMATS
from qedfuse.cli.in_use import share_hint
from qedfuse.cli.params import (
    GEOMETRY_HELP,
    GEOMETRY_OPTIONS,
    backing_options,
    backing_policy,
    file_name,
    output_option,
    parse_geometry,
    parse_options,
    share_option,
    size_param,
    to_json,
)
from qedfuse.cli.progress import Bar
from qedfuse.errors import EXIT_OK
from qedfuse.qed.geometry import Geometry

if TYPE_CHECKING:
    from qedfuse.chain.policy import BackingPolicy
    from qedfuse.tools.measure import Measurement


@click.command()
@click.option("-f", "source_format", type=click.Choice(FORMATS), help="IMAGE's format; probed if not given.")
@click.option(
    "-O", "target_format", type=click.Choice(["raw", "qed"]), default="raw", show_default=True, help="Of the new file."
)
@click.option("-o", "options", metavar="OPT,...", multiple=True, help=f"Of a new qed image: {GEOMETRY_HELP}.")
@click.option("--size", type=size_param, metavar="SIZE", help="Of a new, empty disk of this size, without IMAGE.")
@output_option
@share_option
@backing_options
@click.argument("image", type=file_name, required=False)
def measure(
    source_format: str | None,
    target_format: str,
    options: tuple[str, ...],
    size: int | None,
    output: str,
    share: bool,
    backing_root: str | None,
    no_backing: bool,
    image: str | None,
) -> int:
    """Tell how long the file gets into which `convert` copies the disk in IMAGE (raw, qed or qcow2, with its backing
    files): with what there is, and when all of the disk has been written.

    For a qed image its data is looked at: a cluster of zeroes takes no place. (Where `convert` shares blocks, on btrfs
    and XFS, it does not look for zeroes: the file gets longer, but takes no more space.)
    """
    if (size is None) == (image is None):
        raise click.UsageError("it needs either IMAGE or --size")
    if size is not None and source_format is not None:
        raise click.UsageError("-f is IMAGE's format: it excludes --size")
    given = parse_options(image or "", options, GEOMETRY_OPTIONS if target_format == "qed" else ())
    geometry = parse_geometry(image or "", given)
    if size is not None:
        from qedfuse.tools.measure import measure_size

        found = measure_size("", size, target_format, geometry)
    else:
        assert image is not None
        policy = backing_policy(backing_root, no_backing)
        found = _measure(image, source_format, target_format, geometry, share, policy)
    if output == "json":
        click.echo(to_json({"required": found.required, "fully-allocated": found.fully_allocated}, indent=4))
    else:
        click.echo(f"required size: {found.required}\nfully allocated size: {found.fully_allocated}")
    return EXIT_OK


def _measure(
    image: str, source_format: str | None, target_format: str, geometry: Geometry, share: bool, policy: BackingPolicy
) -> Measurement:
    import trio

    from qedfuse.tools.measure import measure_image

    bar = Bar("measuring", sys.stderr.isatty())
    job = partial(
        measure_image,
        image,
        source_format=source_format,
        target_format=target_format,
        geometry=geometry,
        share=share,
        policy=policy,
        progress=bar,
    )
    try:
        with share_hint():
            return trio.run(job)
    finally:
        bar.close()
