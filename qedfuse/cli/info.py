"""`qedfuse info`."""

from __future__ import annotations

from functools import partial

import click

from qedfuse.cli.in_use import share_hint
from qedfuse.cli.params import (
    backing_options,
    backing_policy,
    file_name,
    format_option,
    output_option,
    share_option,
    show_size,
    size_param,
    to_json,
)
from qedfuse.errors import EXIT_FAILED, EXIT_OK
from qedfuse.text import printable
from qedfuse.tools.info import ImageInfo, read_chain, read_info
from qedfuse.tools.untrusted import DEFAULT_MAX_SIZE, read_untrusted


@click.command(
    epilog=f"Exit codes: {EXIT_OK} shown, {EXIT_FAILED} not an image, in use, or with --untrusted: not to be trusted."
)
@format_option
@output_option
@share_option
@click.option("--backing-chain", is_flag=True, help="Show the files below it, too (and open them).")
@backing_options
@click.option(
    "--untrusted",
    is_flag=True,
    help="Open nothing but the image, in bounded time and memory, and fail if it refers to anything outside itself, "
    "is larger than --max-size, or is inconsistent.",
)
@click.option(
    "--max-size",
    type=size_param,
    metavar="SIZE",
    default=str(DEFAULT_MAX_SIZE),
    help=f"With --untrusted: the largest size an image may declare (default: {show_size(DEFAULT_MAX_SIZE)}).",
)
@click.argument("image", type=file_name)
def info(
    output: str,
    share: bool,
    backing_chain: bool,
    backing_root: str | None,
    no_backing: bool,
    untrusted: bool,
    max_size: int,
    image: str,
) -> None:
    """Show what IMAGE is: its format, sizes, backing file.

    Only IMAGE is opened (and the journal of a conversion in place, if there is one, but not with --untrusted), and only
    its header is read, unless --backing-chain or --untrusted is given. With --backing-root or --no-backing the files
    below it are opened, too, as far as that is allowed; else it fails.
    """
    confined = no_backing or backing_root is not None
    if untrusted and (backing_chain or confined):
        raise click.UsageError(
            "--untrusted opens nothing but the image: it excludes --backing-chain, --backing-root and --no-backing"
        )
    with share_hint():
        if backing_chain or confined:
            chain = _read_chain(image, share, backing_root, no_backing)
        elif untrusted:
            chain = [read_untrusted(image, share=share, max_size=max_size)]
        else:
            chain = [read_info(image, share=share)]
    if output == "json":
        items = [item.to_json() for item in chain]
        click.echo(to_json(items if backing_chain else items[0], indent=4))
    else:
        click.echo("\n\n".join(_describe(item) for item in (chain if backing_chain else chain[:1])))


def _read_chain(image: str, share: bool, backing_root: str | None, no_backing: bool) -> list[ImageInfo]:
    import trio

    return trio.run(partial(read_chain, image, share=share, policy=backing_policy(backing_root, no_backing)))


def _describe(item: ImageInfo) -> str:
    """The lines that qemu-img prints, and ours behind them."""
    lines = [
        f"image: {printable(item.path)}",
        f"file format: {item.format}",
        f"virtual size: {show_size(item.virtual_size)} ({item.virtual_size} bytes)",
        f"disk size: {show_size(item.actual_size)}",
    ]
    if item.shared.size:
        least = "" if item.shared.all else "at least "
        lines.append(f"shared with other files: {least}{show_size(item.shared.size)}")
    header = item.header
    if header is not None and header.needs_check:
        lines.append("cleanly shut down: no")
    if item.unfinished is not None:
        lines.append(f"unfinished: {printable(item.unfinished)}")
    if item.cluster_size is not None:
        lines.append(f"cluster_size: {item.cluster_size}")
    if item.backing_name is not None and item.full_backing_name is not None:
        actual = f" (actual path: {printable(item.full_backing_name)})"
        same = item.full_backing_name == item.backing_name
        lines.append(f"backing file: {printable(item.backing_name)}{'' if same else actual}")
        if item.backing_format is not None:
            lines.append(f"backing file format: {printable(item.backing_format)}")
    if header is not None:
        lines += [
            "Format specific information:",
            f"    table size: {header.table_size}",
            f"    l1 table offset: {header.l1_table_offset:#x}",
            f"    features: {header.features:#x}",
            f"    compat features: {header.compat_features:#x}",
            f"    autoclear features: {header.autoclear_features:#x}",
        ]
    return "\n".join(lines)
