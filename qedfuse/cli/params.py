"""Sizes and names on the command line, read and shown as qemu-img does."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from qedfuse.errors import QedfuseError, UsageError
from qedfuse.qed.geometry import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, Geometry
from qedfuse.text import printable

if TYPE_CHECKING:
    from qedfuse.chain.policy import BackingPolicy
    from qedfuse.qed.header import Header

P = ParamSpec("P")
T = TypeVar("T")

_UNITS = {unit: 1024**power for power, unit in enumerate("bkmgtpe")}
_SIZE = re.compile(r"(?=\.?\d)(?P<whole>\d*)(?:\.(?P<part>\d+))?(?P<unit>[bkmgtpe])?", re.IGNORECASE | re.ASCII)
_HEX = re.compile(r"0x[0-9a-f]+", re.IGNORECASE | re.ASCII)
_MAX_SIZE = (1 << 63) - 1

#: What `-o` says of a new image's shape.
GEOMETRY_OPTIONS = ("cluster_size", "table_size")
#: And of its backing file.
BACKING_OPTIONS = ("backing_file", "backing_fmt")


def parse_size(text: str) -> int:
    """Bytes: a number, with a fraction and one of the suffixes k, M, G, T, P, E (powers of 1024), or in hex.

    Raises ValueError with a plain message. Source: qemu-img(1), "size".
    """
    if _HEX.fullmatch(text):
        size = int(text, 16)
    else:
        found = _SIZE.fullmatch(text)
        unit = _UNITS[(found["unit"] or "b").lower()] if found else 0
        if not found or (found["part"] and unit == 1):
            raise ValueError(f"{text!r} is no size (a number, with k, M, G, T, P or E for powers of 1024)")
        part = found["part"] or ""
        scale = 10 ** len(part)
        size = (2 * int(found["whole"] + part) * unit + scale) // (2 * scale)  # rounded, half up
    if size > _MAX_SIZE:
        raise ValueError(f"{text!r} is over the largest size, {_MAX_SIZE}")
    return size


def show_size(size: int) -> str:
    """A size for a person: three digits and a binary unit, as qemu-img writes it."""
    units = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
    power = 0
    while size >= 1000 * 1024**power and power < len(units) - 1:
        power += 1
    return f"{size / 1024**power:.3g} {units[power]}B"


def size_param(text: str) -> int:
    """The type of a click parameter in bytes; see `parse_size`."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def file_name(text: str) -> str:
    """The type of a click parameter that names a file or a directory, which need not exist. An empty name would be
    taken for the current directory, and without one a relative name is nothing."""
    if not text:
        raise click.BadParameter("the name is empty")
    if not os.path.isabs(text):
        try:
            os.getcwd()
        except OSError as error:
            why = "was deleted" if isinstance(error, FileNotFoundError) else f"cannot be told: {error.strerror}".lower()
            raise QedfuseError(text, f"is a relative name, but the current directory {why}", error.errno) from None
    return text


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON that any parser takes: what is no character in a file's name is U+FFFD in it, as in qemu-img's."""
    return json.dumps(_characters(value), indent=indent)


def _characters(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {key: _characters(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_characters(item) for item in value]
    return value


output_option = click.option(
    "--output", type=click.Choice(["human", "json"]), default="human", show_default=True, help="What to print."
)
share_option = click.option(
    "-U",
    "--force-share",
    "share",
    is_flag=True,
    help="Look at an image that another process is writing; what is shown may already be old.",
)

#: qemu-img's scripts say what an image is.
format_option = click.option(
    "-f", "_format", type=click.Choice(["qed"]), expose_value=False, help="The image's format, as for qemu-img."
)

#: qemu-img's -t or -T, which say how a file is cached meanwhile: taken for the sake of scripts, and without effect.
cache_hint = partial(
    click.option,
    expose_value=False,
    hidden=True,
    type=click.Choice(["none", "writeback", "writethrough", "directsync", "unsafe"]),
)

#: How help texts describe GEOMETRY_OPTIONS.
GEOMETRY_HELP = (
    f"cluster_size=SIZE (a power of two, 4k to 64M; default {DEFAULT_CLUSTER_SIZE // 1024}k), table_size=CLUSTERS "
    f"(1, 2, 4, 8 or 16; default {DEFAULT_TABLE_SIZE})"
)


def backing_options(command: Callable[P, T]) -> Callable[P, T]:
    """`--backing-root` and `--no-backing`: the parameters `backing_root` and `no_backing`."""
    root = click.option("--backing-root", type=file_name, metavar="DIR", help="Refuse backing files outside DIR.")
    none = click.option("--no-backing", is_flag=True, help="Refuse backing files.")
    return root(none(command))


def check_backing_root(root: str | None) -> None:
    """Raises UsageError if it is no directory."""
    if root is not None and not os.path.isdir(root):
        raise UsageError(root, "is not a directory (--backing-root)")


def backing_policy(root: str | None, none: bool) -> BackingPolicy:
    """What `backing_options` ask for. Raises UsageError if `root` is no directory."""
    from qedfuse.chain.policy import BackingPolicy

    check_backing_root(root)
    return BackingPolicy(allowed=not none, root=root)


def parse_options(file: str, given: Iterable[str], known: Sequence[str]) -> dict[str, str]:
    """The values of `-o name=value,...`; of a name given twice the last counts, and `,,` is a comma of a value.

    Raises UsageError, with `file`, for a name that is not in `known`.
    """
    result: dict[str, str] = {}
    for option in ",".join(given).replace(",,", "\0").split(",") if given else []:
        name, equals, value = option.replace("\0", ",").partition("=")
        if name not in known or not equals:
            there_are = " and ".join(f"{name}=" for name in known) or "none"
            raise UsageError(file, f"unknown option {name + equals + value!r} (there are {there_are})")
        result[name] = value
    return result


def parse_geometry(file: str, options: Mapping[str, str]) -> Geometry:
    """The geometry that the options cluster_size and table_size give. Raises UsageError."""
    sizes: dict[str, int] = {}
    for name in GEOMETRY_OPTIONS:
        if name in options:
            try:
                sizes[name] = parse_size(options[name])
            except ValueError as error:
                raise UsageError(file, f"{name}: {error}") from None
    try:
        return Geometry(**sizes)
    except ValueError as error:
        raise UsageError(file, str(error)) from None


def parse_backing(
    options: Mapping[str, str], backing: str | None, format: str | None, letter: str
) -> tuple[str | None, str | None]:
    """A new image's backing file and its format, by `-o` or else by the options `letter` and -F. Raises UsageError."""
    from qedfuse.chain.format_probe import FORMATS

    backing = options.get("backing_file", backing)
    format = options.get("backing_fmt", format)
    if format is not None and backing is None:
        raise click.UsageError(f"-F is the backing file's format: it needs {letter}")
    if format not in (None, *FORMATS):
        raise click.UsageError(f"backing_fmt: {format!r} is not one of {', '.join(FORMATS)}")
    return backing, format


def warn_of_objection(file: str, header: Header) -> None:
    """Say so if QEMU cannot open the new image `file`."""
    from qedfuse.qed.new_image import qemu_objection

    objection = qemu_objection(header.geometry, header.image_size)
    if objection is not None:
        click.echo(f"qedfuse: {printable(file)}: warning: QEMU cannot open images with {objection}", err=True)
