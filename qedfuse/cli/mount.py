"""`qedfuse mount`, and fstab's `qedfuse IMAGE MOUNTPOINT -o ...`."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from dataclasses import replace

import click

from qedfuse.cli.params import backing_options, check_backing_root, file_name
from qedfuse.daemon.config import MountConfig
from qedfuse.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, QedfuseError, UsageError
from qedfuse.fuse.options import MountOptions, parse_mount_options
from qedfuse.host.file_id import FileId
from qedfuse.host.mountinfo import find_mount
from qedfuse.host.walk import LeadsBackError, Walk


@click.command(
    epilog=f"Exit codes: {EXIT_OK} mounted and usable, {EXIT_FAILED} failed (nothing stays mounted), {EXIT_USAGE} "
    "wrong usage. With -f: 0 unmounted and nothing lost."
)
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and log to stderr.")
@click.option("--ro", "read_only", is_flag=True, help="Write nothing: show read-only files.")
@click.option(
    "-o",
    "options",
    metavar="OPT,...",
    multiple=True,
    help="allow_other, default_permissions, uid=N, gid=N, umask=NNN, direct_io, fixed_size, ro, rw, backing_root=DIR, "
    "no_backing, and what mount(8) and fstab(5) add.",
)
@click.option(
    "--no-fastpath",
    "fastpath",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Answer all in Python: slower, and without fallocate, discard and SEEK_HOLE.",
)
@click.option("--log-file", type=file_name, metavar="FILE", help="Where the daemon logs (default: syslog).")
@backing_options
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=file_name)
@click.argument("mountpoint", type=file_name)
def mount(
    foreground: bool,
    read_only: bool,
    options: tuple[str, ...],
    fastpath: bool,
    log_file: str | None,
    backing_root: str | None,
    no_backing: bool,
    sources: tuple[str, ...],
    mountpoint: str,
) -> int:
    """Show the images SOURCE... as raw files at MOUNTPOINT.

    If MOUNTPOINT is a file, the one image appears there. If it is a directory, NAME.qed appears in it as NAME.raw, and
    a SOURCE that is a directory shows every image in it, opened when first used.

    Returns when the files can be used. The mount ends when it is unmounted. SIGTERM makes the daemon unmount it; if it
    is in use, its users are served to their end, unless a second SIGTERM stops that.
    """
    parsed = parse_mount_options(options)
    if read_only:
        parsed = replace(parsed, read_only=True)
    if no_backing:
        parsed = replace(parsed, no_backing=True)
    if backing_root is not None:
        parsed = replace(parsed, backing_root=backing_root)
    over_file, mountpoint = _check_mountpoint(mountpoint)
    images, directories = _sort_sources(sources, mountpoint, over_file)
    parsed = _check_backing_root(parsed)

    # Before anything imports pyfuse3, and also if it is to answer nothing: pyfuse3's own read of /dev/fuse waits, and
    # the event loop with it, when the request of which it was told has been withdrawn.
    with contextlib.suppress(ImportError):  # the daemon tries again, and logs it
        import qedfuse.fuse.fastpath  # noqa: F401

    from qedfuse.daemon.daemon import serve
    from qedfuse.daemon.launch import inherited_descriptors, open_standard_files, run_in_background
    from qedfuse.daemon.logs import start_logging

    inherited = [] if foreground else inherited_descriptors(images)
    open_standard_files()
    config = MountConfig(images, directories, mountpoint, over_file, parsed, fastpath)
    logs = start_logging(foreground=foreground, log_file=log_file)
    if foreground:
        return serve(config)
    code = run_in_background(functools.partial(serve, config), inherited)
    if not logs:
        with contextlib.suppress(OSError):  # mounted it is
            click.echo("qedfuse mount: mounted, but there is nowhere to log to (no /dev/log): use --log-file", err=True)
    return code


def _check_mountpoint(mountpoint: str) -> tuple[bool, str]:
    """Whether it is a file (or a directory), and its real path."""
    path = os.path.realpath(mountpoint)
    here = find_mount(path)
    if here is not None and here.is_qedfuse:
        raise QedfuseError(
            mountpoint, f"is already a qedfuse mount (of {here.source}); qedfuse umount it first", errno.EBUSY
        )
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise QedfuseError(
            mountpoint,
            "the mountpoint does not exist; create an empty file (for one image) or a directory there first",
            errno.ENOENT,
        ) from None
    except OSError as error:
        error.filename = mountpoint
        raise
    if stat.S_ISREG(mode):
        return True, path
    if stat.S_ISDIR(mode):
        return False, path
    raise UsageError(mountpoint, "the mountpoint must be a regular file or a directory")


def _sort_sources(
    sources: tuple[str, ...], mountpoint: str, over_file: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The images and the directories among the sources, as absolute paths."""
    images: list[str] = []
    directories: list[str] = []
    for source in sources:
        path = os.path.abspath(source)
        if not os.path.isdir(source):
            _check_image(source, path, mountpoint)
            images.append(path)
            continue
        if over_file:
            raise UsageError(
                source, f"is a directory, but the mountpoint {mountpoint} is a file: it can show one image"
            )
        if os.path.commonpath((os.path.realpath(source), mountpoint)) == mountpoint:
            raise UsageError(source, f"would be hidden by mounting over {mountpoint}")
        _check_source(source, path)
        directories.append(path)
    if over_file and len(images) > 1:
        raise UsageError(mountpoint, "the mountpoint is a file and can show one image; several need a directory")
    return tuple(images), tuple(directories)


def _check_image(source: str, path: str, mountpoint: str) -> None:
    """An image over itself could never be opened again by its name."""
    try:
        same = FileId.at(path) == FileId.at(mountpoint)
    except OSError:
        return  # opening it tells why
    if same:
        raise UsageError(source, "is the mountpoint itself; the raw file needs an empty file, or a directory")


def _check_source(source: str, path: str) -> None:
    """The daemon would look into another one's mount, or, by and by, into its own."""
    with Walk() as walk:
        try:
            walk.start(path)
        except LeadsBackError as error:
            raise UsageError(source, f"lies in a qedfuse mount ({error.mountpoint})") from None


def _check_backing_root(options: MountOptions) -> MountOptions:
    if options.backing_root is None:
        return options
    check_backing_root(options.backing_root)
    return replace(options, backing_root=os.path.realpath(options.backing_root))
