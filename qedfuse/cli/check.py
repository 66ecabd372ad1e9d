"""`qedfuse check`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from qedfuse.cli.in_use import share_hint
from qedfuse.cli.params import file_name, format_option, output_option, to_json
from qedfuse.cli.progress import Bar
from qedfuse.errors import EXIT_FAILED, EXIT_OK
from qedfuse.text import printable

if TYPE_CHECKING:
    from qedfuse.check.result import CheckResult

EXIT_CORRUPT = 2
EXIT_LEAKS = 3
EXIT_UNSUPPORTED = 63


class _Check(click.Command):
    """Wrong usage must not exit with 2, which says that the image is corrupt."""

    usage_exit_code = EXIT_FAILED


@click.command(
    cls=_Check,
    name="check",
    epilog=f"Exit codes, of the state after a repair: {EXIT_OK} the image is consistent, {EXIT_FAILED} it could not be "
    f"checked (also: wrong usage), {EXIT_CORRUPT} it is corrupt, {EXIT_LEAKS} it has leaked clusters but is not "
    f"corrupt, {EXIT_UNSUPPORTED} it is not a QED image.",
)
@format_option
@output_option
@click.option(
    "-r",
    "--repair",
    type=click.Choice(["leaks", "all"]),
    help="leaks: give leaked clusters back to the host: the file's last clusters are moved to where they are, and it "
    "gets shorter. all: also repair the tables; what is referenced twice is copied, what cannot be right is dropped.",
)
@click.option(
    "-U",
    "--force-share",
    "share",
    is_flag=True,
    help="Check an image that another process is writing; what is found may be only its work in progress.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.argument("image", type=file_name)
def check(output: str, repair: str | None, share: bool, quiet: bool, image: str) -> int:
    """Check whether IMAGE is consistent, and repair it."""
    from qedfuse.host.waiting import run_blocking

    if share and repair:
        raise click.UsageError("-U is for looking only: it excludes -r")
    bar = Bar("checking", sys.stderr.isatty() and not quiet)
    try:
        with share_hint(target=image if repair else None):
            result = run_blocking(_check(image, repair, share, bar))
    finally:
        bar.close()
    if result is None:
        click.echo(f"qedfuse: {printable(image)}: not a qed image; only those can be checked", err=True)
        return EXIT_UNSUPPORTED
    if output == "json":
        click.echo(to_json(result.to_json(), indent=4))
    elif not quiet:
        click.echo("\n".join(_describe(result)))
    return exit_code(result)


async def _check(path: str, repair: str | None, share: bool, bar: Bar) -> CheckResult | None:
    """None: the file is something else."""
    from qedfuse.chain.unfinished import UnfinishedError, describe_unfinished, refuse_unfinished
    from qedfuse.check.check import Repair, check_image
    from qedfuse.host.closing import closing
    from qedfuse.host.file_storage import FileStorage
    from qedfuse.host.image_lock import lock
    from qedfuse.qed.header import NotQedError
    from qedfuse.qed.header_io import read_header

    try:
        async with closing(FileStorage.open(path, repair is not None)) as storage:
            if not share:
                lock(storage.fileno(), path, writable=repair is not None)
            if repair is not None:
                refuse_unfinished(storage.fileno(), path)
            unfinished = describe_unfinished(storage.fileno(), path)
            try:
                header = await read_header(storage)
            except NotQedError:
                if unfinished is not None:
                    raise UnfinishedError(path, unfinished) from None
                raise
            result = await check_image(storage, header, repair=Repair(repair or "none"), progress=bar)
            if unfinished is not None:
                result.note(unfinished, first=True)
            return result
    except NotQedError:
        return None


def exit_code(result: CheckResult) -> int:
    """qemu-img's, for what is left after a repair."""
    if result.check_errors:
        return EXIT_FAILED
    if result.corruptions:
        return EXIT_CORRUPT
    return EXIT_LEAKS if result.leaks else EXIT_OK


def _describe(result: CheckResult) -> list[str]:
    lines = [printable(problem) for problem in result.problems]
    if result.problem_count > len(lines):
        lines.append(f"... and {result.problem_count - len(lines)} more")
    if result.corruptions_fixed:
        lines.append(f"repaired: {_count(result.corruptions_fixed, 'error')}")
    if result.leaks_fixed:
        lines.append(f"given back: {_count(result.leaks_fixed, 'leaked cluster')}")
    if result.check_errors:
        lines.append(f"{_count(result.check_errors, 'table')} could not be read; the check is incomplete")
    if result.corruptions:
        lines.append(f"{_count(result.corruptions, 'error')}: data may be lost or get lost; do not write to the image")
    if result.leaks:
        lines.append(f"{_count(result.leaks, 'leaked cluster')}: wasted space, no harm to data")
    if not (result.check_errors or result.corruptions or result.leaks):
        lines.append("no errors")
    if result.allocated_clusters and result.total_clusters:
        allocated = 100 * result.allocated_clusters / result.total_clusters
        fragmented = 100 * result.fragmented_clusters / result.allocated_clusters
        lines.append(
            f"{result.allocated_clusters} of {result.total_clusters} clusters allocated ({allocated:.2f}%), "
            f"{fragmented:.2f}% of them fragmented"
        )
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
