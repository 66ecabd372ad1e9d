"""`qedfuse convert --in-place`."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from qedfuse.cli.in_use import name_mount
from qedfuse.cli.params import GEOMETRY_OPTIONS, parse_geometry, parse_options, warn_of_objection
from qedfuse.cli.progress import Bar, Percentage
from qedfuse.cli.until_signal import until_signal
from qedfuse.errors import EXIT_OK, InUseError
from qedfuse.text import printable

if TYPE_CHECKING:
    from qedfuse.tools.in_place.convert import FileConversion

#: The parameters of `qedfuse convert` that mean something to a conversion in place.
_PARAMETERS = {"in_place", "undo", "force", "source_format", "target_format", "options", "percentage", "quiet"}


def refuse_other_options(context: click.Context) -> None:
    """Raise a UsageError for what is given and says how to copy."""
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name in context.params and name not in (*_PARAMETERS, "source"):
            shown = parameter.opts[0] if isinstance(parameter, click.Option) else "TARGET"
            raise click.UsageError(f"--in-place converts one FILE, and copies nothing: it excludes {shown}")


def convert_in_place(
    file: str,
    source_format: str | None,
    target_format: str | None,
    options: Iterable[str],
    *,
    undo: bool,
    force: bool,
    bar: Bar | Percentage,
) -> int:
    """`target_format` None: raw, or what is under way."""
    import trio

    from qedfuse.tools.in_place.convert import FileConversion
    from qedfuse.tools.in_place.plan import Wanted

    given = parse_options(file, options, GEOMETRY_OPTIONS if target_format == "qed" else ())
    geometry = parse_geometry(file, given)
    wanted = Wanted(
        cluster_size=geometry.cluster_size if "cluster_size" in given else None,
        table_size=geometry.table_size if "table_size" in given else None,
        force=force,
    )
    conversion = FileConversion(file, source=source_format, target=target_format)
    job = conversion.take_back if undo else partial(conversion.run, wanted, bar)
    try:
        outcome = trio.run(until_signal, job, _name_mount(conversion))
    finally:
        bar.close()
    if isinstance(outcome, signal.Signals):
        _say(file, f"interrupted; {conversion.ending}")
        return 128 + outcome
    if conversion.header is not None:
        warn_of_objection(file, conversion.header)
    if conversion.looks_like is not None:
        _say(file, f"warning: the disk begins like a {conversion.looks_like} image; say -f raw wherever it is opened")
    return EXIT_OK


@contextmanager
def _name_mount(conversion: FileConversion) -> Iterator[None]:
    """As `name_mount`; the message ends as the others do."""
    try:
        with name_mount():
            yield
    except InUseError as error:
        ending = f"; {conversion.ending}"
        raise error.reworded(error.message.removesuffix(ending) + ending) from None


def _say(file: str, message: str) -> None:
    click.echo(f"qedfuse: {printable(file)}: {printable(message)}", err=True)
