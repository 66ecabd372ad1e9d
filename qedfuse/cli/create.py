"""`qedfuse create`."""

from __future__ import annotations

from functools import partial

import click

from qedfuse.chain.format_probe import FORMATS
from qedfuse.cli.in_use import name_mount
from qedfuse.cli.params import (
    BACKING_OPTIONS,
    GEOMETRY_HELP,
    GEOMETRY_OPTIONS,
    file_name,
    format_option,
    parse_backing,
    parse_geometry,
    parse_options,
    size_param,
    warn_of_objection,
)
from qedfuse.text import printable


@click.command()
@format_option
@click.option("-b", "backing", metavar="BACKING", help="The backing file; a relative name is relative to FILE.")
@click.option(
    "-F",
    "backing_format",
    type=click.Choice(FORMATS),
    help="The backing file's format; probed if not given. What is raw now stays raw, whatever is written to it.",
)
@click.option(
    "-o",
    "options",
    metavar="OPT,...",
    multiple=True,
    help=f"{GEOMETRY_HELP}, size=, backing_file=, backing_fmt= (as SIZE, -b, -F).",
)
@click.option("-q", "quiet", is_flag=True, help="Print only errors.")
@click.argument("file", type=file_name)
@click.argument("size", type=size_param, required=False)
def create(
    backing: str | None,
    backing_format: str | None,
    options: tuple[str, ...],
    quiet: bool,
    file: str,
    size: int | None,
) -> None:
    """Create the image FILE of SIZE bytes (suffixes k, M, G, T, P, E: powers of 1024), rounded up to 512.

    Without SIZE it is as large as its backing file. A FILE that exists is replaced, unless somebody uses it.
    """
    given = parse_options(file, options, (*GEOMETRY_OPTIONS, *BACKING_OPTIONS, "size"))
    backing, backing_format = parse_backing(given, backing, backing_format, "-b")
    if "size" in given:
        if size is not None:
            raise click.UsageError("the size is given twice")
        size = size_param(given["size"])
    geometry = parse_geometry(file, given)
    import trio

    from qedfuse.tools.create import create_image

    job = partial(create_image, file, size, geometry=geometry, backing=backing, backing_format=backing_format)
    with name_mount():
        header, found_format = trio.run(job)
    if not quiet:
        words = [f"Formatting '{file}', fmt=qed size={header.image_size}"]
        words += [f"backing_file={backing} backing_fmt={found_format}"] if backing is not None else []
        words += [f"cluster_size={header.cluster_size}"]
        words += [f"table_size={header.table_size}"] if "table_size" in given else []
        click.echo(printable(" ".join(words)))
    warn_of_objection(file, header)
