"""`qedfuse map`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from qedfuse.cli.in_use import share_hint
from qedfuse.cli.params import (
    backing_options,
    backing_policy,
    file_name,
    format_option,
    output_option,
    share_option,
    size_param,
    to_json,
)
from qedfuse.text import printable

if TYPE_CHECKING:
    from qedfuse.chain.policy import BackingPolicy
    from qedfuse.layers.layer import Layer
    from qedfuse.layers.mapping import MapEntry


@click.command(name="map")
@format_option
@output_option
@share_option
@click.option("-s", "--start-offset", type=size_param, metavar="SIZE", default="0", help="Where to begin.")
@click.option("-l", "--max-length", type=size_param, metavar="SIZE", help="How much to show; default: to the end.")
@backing_options
@click.argument("image", type=file_name)
def map_command(
    output: str,
    share: bool,
    start_offset: int,
    max_length: int | None,
    backing_root: str | None,
    no_backing: bool,
    image: str,
) -> None:
    """Show where the bytes of IMAGE are, in it and in the files below it.

    In human output, only what is stored; as JSON, everything, with the keys of `qemu-img map`.
    """
    import trio

    policy = backing_policy(backing_root, no_backing)
    with share_hint():
        trio.run(_map, output == "json", share, policy, start_offset, max_length, image)


async def _map(as_json: bool, share: bool, policy: BackingPolicy, start: int, length: int | None, path: str) -> None:
    from qedfuse.chain.chain import open_layer
    from qedfuse.host.closing import closing
    from qedfuse.layers.mapping import map_image

    async with closing(await open_layer(path, "qed", share=share, policy=policy)) as top:
        sparse = await _sparse_layers(top)
        async with aclosing(map_image(top, start, length, sparse=sparse)) as entries:
            await (_print_json(entries) if as_json else _print_table(entries))


async def _sparse_layers(top: Layer) -> list[Layer]:
    """The qcow2 images of a chain that QEMU takes for preallocated."""
    from qedfuse.layers.layer import layers_of
    from qedfuse.layers.qcow2.layer import Qcow2Layer
    from qedfuse.layers.qcow2.refcounts import is_preallocated

    qcow2 = [layer for layer in layers_of(top) if isinstance(layer, Qcow2Layer)]
    return [layer for layer in qcow2 if await is_preallocated(layer.storage, layer.header)]


async def _print_json(entries: AsyncIterator[MapEntry]) -> None:
    out = sys.stdout
    separator = "["
    async for entry in entries:
        out.write(separator + to_json(entry.to_json()))
        separator = ",\n"
    out.write("[]\n" if separator == "[" else "]\n")


async def _print_table(entries: AsyncIterator[MapEntry]) -> None:
    out = sys.stdout
    out.write(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n")
    async for entry in entries:
        if entry.data and not entry.zero:
            where = "compressed" if entry.offset is None else _hex(entry.offset)
            name = printable(entry.filename or "")
            out.write(f"{_hex(entry.start):<16}{_hex(entry.length):<16}{where:<16}{name}\n")


def _hex(value: int) -> str:
    return f"{value:#x}" if value else "0"
