"""`qedfuse create`."""

from __future__ import annotations

from functools import partial

import click

from qedfuse.cli.params import parse_size, size_param
from qedfuse.errors import UsageError, printable
from qedfuse.geometry import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, Geometry


@click.command()
@click.option("-b", "backing", metavar="BACKING", help="The backing file; a relative name is relative to FILE.")
@click.option(
    "-F",
    "backing_format",
    type=click.Choice(["raw", "qed", "qcow2"]),
    help="The backing file's format; probed if not given. What is raw now stays raw, whatever is written to it.",
)
@click.option(
    "-o",
    "options",
    metavar="OPT,...",
    multiple=True,
    help=f"cluster_size=SIZE (a power of two, 4k to 64M; default {DEFAULT_CLUSTER_SIZE // 1024}k), table_size=CLUSTERS "
    f"(1, 2, 4, 8 or 16; default {DEFAULT_TABLE_SIZE}).",
)
@click.option("-q", "quiet", is_flag=True, help="Print only errors.")
@click.argument("file")
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
    if backing_format and backing is None:
        raise click.UsageError("-F is the backing file's format: it needs -b")
    given = _parse_options(file, options)
    try:
        geometry = Geometry(**given)
    except ValueError as error:
        raise UsageError(file, str(error)) from None
    import trio

    from qedfuse.create import create_image, qemu_objection

    header, found_format = trio.run(
        partial(create_image, file, size, geometry=geometry, backing=backing, backing_format=backing_format)
    )
    if not quiet:
        words = [f"Formatting '{file}', fmt=qed size={header.image_size}"]
        words += [f"backing_file={backing} backing_fmt={found_format}"] if backing is not None else []
        words += [f"cluster_size={header.cluster_size}"]
        words += [f"table_size={header.table_size}"] if "table_size" in given else []
        click.echo(printable(" ".join(words)))
    objection = qemu_objection(header)
    if objection:
        click.echo(f"qedfuse: {printable(file)}: warning: QEMU cannot open images with {objection}", err=True)


def _parse_options(file: str, options: tuple[str, ...]) -> dict[str, int]:
    """The values of `-o name=value,...`; of a name given twice the last counts."""
    result: dict[str, int] = {}
    for option in ",".join(options).split(",") if options else []:
        name, equals, value = option.partition("=")
        if name not in ("cluster_size", "table_size") or not equals:
            raise UsageError(file, f"unknown option {option!r} (there are cluster_size= and table_size=)")
        try:
            result[name] = parse_size(value)
        except ValueError as error:
            raise UsageError(file, f"{name}: {error}") from None
    return result
