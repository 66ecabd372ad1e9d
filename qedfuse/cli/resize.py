"""`qedfuse resize`."""

from __future__ import annotations

import signal
from functools import partial

import click

from qedfuse.chain.format_probe import FORMATS, RAW
from qedfuse.cli.in_use import name_mount
from qedfuse.cli.params import backing_options, backing_policy, file_name, size_param
from qedfuse.cli.until_signal import until_signal
from qedfuse.errors import EXIT_OK
from qedfuse.text import printable


class _Resize(click.Command):
    """SIZE comes last and may look like an option: `-1G`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[-1][:1] == "-" and args[-1][1:2] in tuple(".0123456789") and "--" not in args:
            args = [*args[:-1], "--", args[-1]]
        return super().parse_args(ctx, args)


def _no_preallocation(_context: click.Context, _parameter: click.Parameter, value: str) -> None:
    if value != "off":
        raise click.BadParameter(f"{value!r}: space is allocated when it is written, there is only 'off'")


@click.command(cls=_Resize)
@click.option("-f", "format", type=click.Choice(FORMATS), help="FILE's format; probed if not given.")
@click.option("--shrink", is_flag=True, help="The disk may get smaller, and lose what lies behind its new end.")
@click.option(
    "--preallocation",
    metavar="off",
    default="off",
    expose_value=False,
    callback=_no_preallocation,
    help="Of what is added; only off.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@backing_options
@click.argument("file", type=file_name)
@click.argument("size", metavar="[+|-]SIZE")
def resize(
    format: str | None,
    shrink: bool,
    quiet: bool,
    backing_root: str | None,
    no_backing: bool,
    file: str,
    size: str,
) -> int:
    """Give the disk in FILE (qed or raw) another SIZE (suffixes k, M, G, T, P, E: powers of 1024), rounded up to 512;
    with + or -, so much more or less than it has.

    What is added reads as zeroes. Before the disk gets smaller, its partitions and file systems must; after it has
    grown, they can.
    """
    import trio

    from qedfuse.tools.resize import NewSize, resize_image

    sign = {"+": 1, "-": -1}.get(size[:1], 0)
    wanted = NewSize(sign, size_param(size[abs(sign) :]))
    policy = backing_policy(backing_root, no_backing)
    job = partial(resize_image, file, wanted, format=format, may_shrink=shrink, policy=policy)
    found = trio.run(until_signal, job, name_mount())
    if isinstance(found, signal.Signals):
        return 128 + found
    if found == RAW and format is None:
        warning = "warning: its format was not given, and guessed to be raw; name it, with -f raw"
        click.echo(f"qedfuse: {printable(file)}: {warning}", err=True)
    if not quiet:
        click.echo("Image resized.")
    return EXIT_OK
