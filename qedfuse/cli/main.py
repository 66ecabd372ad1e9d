"""The command `qedfuse`: finds the subcommand, and turns what goes wrong into one plain line and an exit code.

A command is a click command whose function returns its exit code (None is 0) and raises OSErrors; it prints no errors
itself. Only the module of the command that runs is imported: pyfuse3 and trio take longer to load than `info` to run.
"""

from __future__ import annotations

import codecs
import errno
import importlib
import io
import os
import select
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import click

from qedfuse import __version__
from qedfuse.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, QedfuseError, leaves
from qedfuse.host.limits import explain_shortage
from qedfuse.text import describe, printable


class _Entry(NamedTuple):
    """Where a command is, and its line in --help (which therefore needs to import none of them)."""

    location: str
    summary: str


COMMANDS = {
    "mount": _Entry("qedfuse.cli.mount:mount", "Show images as raw files."),
    "umount": _Entry("qedfuse.cli.umount:umount", "Unmount, and wait until the images are closed."),
    "create": _Entry("qedfuse.cli.create:create", "Create an image."),
    "info": _Entry("qedfuse.cli.info:info", "Show what an image is."),
    "map": _Entry("qedfuse.cli.map:map_command", "Show where an image's bytes are."),
    "convert": _Entry("qedfuse.cli.convert:convert", "Copy an image, as a raw disk or a qed image."),
    "check": _Entry("qedfuse.cli.check:check", "Check an image, and repair it."),
    "compact": _Entry("qedfuse.cli.compact:compact", "Make an image's file as short as what it holds."),
    "compare": _Entry("qedfuse.cli.compare:compare", "Tell whether two images have the same content."),
    "resize": _Entry("qedfuse.cli.resize:resize", "Give an image another size."),
    "measure": _Entry("qedfuse.cli.measure:measure", "Tell how long a converted image would be."),
    "rebase": _Entry("qedfuse.cli.rebase:rebase", "Put an image over another backing file."),
    "commit": _Entry("qedfuse.cli.commit:commit", "Write an image into its backing file."),
    "status": _Entry("qedfuse.cli.status:status", "Show what a mount is doing."),
}

_HELP = f"""Show QED disk images as flat raw files, read and write.

`qedfuse IMAGE MOUNTPOINT [-o OPT,...]` is the same as `qedfuse mount`: /etc/fstab's type fuse.qedfuse calls it so.

Exit codes: {EXIT_OK} done, {EXIT_FAILED} failed (one line on stderr names the file and what is wrong), {EXIT_USAGE}
wrong usage, {EXIT_INTERRUPTED} interrupted. `check` has qemu-img's codes: see `qedfuse check --help`. QEDFUSE_DEBUG=1
adds the traceback of an internal error.
"""


class _Commands(click.Group):
    """The commands by name, loaded when they run; anything else with two words is fstab's form of mount."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, attribute = entry.location.split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["mount", *args] if _is_mount_helper(args) else args)


def _is_mount_helper(args: Sequence[str]) -> bool:
    """Whether this is `IMAGE MOUNTPOINT` with options anywhere, and no command.

    Raises UsageError if the first word is neither a command nor, as far as can be seen, an image.
    """
    words = list(_words(args))
    if not words or words[0] in COMMANDS:
        return False
    if len(words) < 2 or not (os.sep in words[0] or os.path.lexists(words[0])):
        raise click.UsageError(f"no such command: {words[0]!r}")
    return True


def _words(args: Sequence[str]) -> Iterator[str]:
    """The arguments that are no options; `-o` is the one option before a command that takes a value."""
    rest = iter(args)
    for arg in rest:
        if arg == "--":
            yield from rest
        elif arg == "-o":
            next(rest, None)
        elif not arg.startswith("-") or arg == "-":
            yield arg


@click.group(cls=_Commands, help=_HELP, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="qedfuse", message="%(prog)s %(version)s")
def qedfuse() -> None:
    pass


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line (without the program's name; default: the process's). Returns the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    codecs.register_error("names", _encode_names)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files in any locale
            stream.reconfigure(errors="names")
    try:
        code = _run(sys.argv[1:] if args is None else list(args))
        sys.stdout.flush()
    except BaseException as error:
        code = _explain(error)
        _drop_output()
    return code


def _encode_names(error: UnicodeError) -> tuple[bytes, int]:
    """What a stream's encoding lacks: bytes of names as they are (see `printable`), other characters as text."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    found = [
        bytes([ord(c) - 0xDC00]) if "\udc80" <= c <= "\udcff" else c.encode("ascii", "backslashreplace")
        for c in lacking
    ]
    return b"".join(found), error.end


def _run(args: list[str]) -> int:
    """As click's own `main`, without its opinions on interrupts and broken pipes."""
    try:
        with qedfuse.make_context("qedfuse", args) as context:
            code = qedfuse.invoke(context)
    except click.exceptions.Exit as done:  # --help and the like
        code = done.exit_code
    return code if isinstance(code, int) else EXIT_OK


def _explain(error: BaseException) -> int:
    """Print the one line for what ended a command. Returns the exit code."""
    if isinstance(error, SystemExit):
        raise error
    causes = list(leaves(error))
    if any(isinstance(cause, (KeyboardInterrupt, click.Abort)) for cause in causes):
        return EXIT_INTERRUPTED
    shortages = [line for cause in causes if (line := explain_shortage(cause)) is not None]
    if shortages:
        _say(shortages[0])
        return EXIT_FAILED
    bugs = [cause for cause in causes if not isinstance(cause, (OSError, click.ClickException))]
    if bugs:
        return _explain_bug(bugs[0], error)
    cause = next((cause for cause in causes if isinstance(cause, QedfuseError)), causes[0])
    if isinstance(cause, OSError):
        return _explain_os_error(cause)
    if isinstance(cause, click.UsageError):
        return _explain_usage(cause)
    assert isinstance(cause, click.ClickException)
    _say(cause.format_message())
    return EXIT_FAILED


def _explain_os_error(error: OSError) -> int:
    if error.errno == errno.EPIPE and _reader_is_gone():
        return EXIT_FAILED  # `qedfuse map ... | head`: its reader wants no more
    _say(describe(error))
    return error.exit_code if isinstance(error, QedfuseError) else EXIT_FAILED


def _explain_usage(error: click.UsageError) -> int:
    command = error.ctx.command_path if error.ctx is not None else "qedfuse"
    message = error.format_message().rstrip(".")
    _say(f"{message[:1].lower()}{message[1:]} (try '{command} --help')", command)
    return getattr(error.ctx and error.ctx.command, "usage_exit_code", EXIT_USAGE)


def _explain_bug(cause: BaseException, error: BaseException) -> int:
    if os.environ.get("QEDFUSE_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    _say(f"internal error: {type(cause).__name__}: {cause}; this is a bug (QEDFUSE_DEBUG=1 shows where)")
    return EXIT_FAILED


def _say(message: str, command: str = "qedfuse") -> None:
    click.echo(f"{command}: {printable(message)}", err=True)


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that is not read any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop_output() -> None:
    """Print what the command has written so far; if it is not read, keep Python from complaining when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
