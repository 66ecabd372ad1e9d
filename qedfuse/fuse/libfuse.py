"""What libfuse is told when it mounts, and what it says: options as words, complaints on stderr.

Source: fuse(8), libfuse lib/mount.c.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qedfuse.fuse.options import MountOptions
from qedfuse.host.mountinfo import SUBTYPE


class _Option(str):
    """A mount option in any bytes: pyfuse3 would encode it as ASCII."""

    __slots__ = ()

    def encode(self, encoding: str = "", errors: str = "") -> bytes:
        return str.encode(self, sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


def option_words(source: str, options: MountOptions) -> set[str]:
    """For `pyfuse3.init`. `source`: what mountinfo shows as the mount's source."""
    words = {f"subtype={SUBTYPE}", _Option("fsname=" + _escape(source)), *options.kernel}
    if options.read_only:
        words.add("ro")
    if options.allow_other:
        words.add("allow_other")
    if options.checks_permissions:
        words.add("default_permissions")
    return words


def _escape(source: str) -> str:
    """libfuse splits options at commas and takes a backslash for an escape."""
    return source.replace("\\", "\\\\").replace(",", "\\,")


@contextmanager
def captured_stderr() -> Iterator[Callable[[], bytes]]:
    """What libfuse and fusermount3 print: the call returns it. What the pipe does not hold is lost: nothing waits."""
    if sys.stderr is not None:
        sys.stderr.flush()
    saved = os.dup(2)
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def read() -> bytes:
        try:
            return os.read(reader, 65536)
        except BlockingIOError:
            return b""

    try:
        os.dup2(writer, 2)
        yield read
    finally:
        os.dup2(saved, 2)
        for fd in (saved, reader, writer):
            os.close(fd)
