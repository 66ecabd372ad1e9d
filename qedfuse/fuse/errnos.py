"""From what was raised to what the kernel is told. Pure; `complaints.py` says it to people, too."""

from __future__ import annotations

import errno

from qedfuse.errors import InUseError, QedfuseError, leaves


def cause_of(error: Exception) -> BaseException:
    """What counts of an exception, which may be a group, as trio has them: a bug before all else, then what came
    first. What is no OSError is a bug."""
    causes = list(leaves(error))
    return next((cause for cause in causes if not isinstance(cause, OSError)), causes[0])


def errno_of(error: Exception, *, broken: bool = False) -> int:
    """The errno for an exception; EIO for a bug, and for an OSError without a number.

    `broken`: an image that is not valid, or that qedfuse does not support, is EIO whatever its error's errno says.
    """
    cause = cause_of(error)
    if not isinstance(cause, OSError):
        return errno.EIO
    if broken and isinstance(cause, QedfuseError) and not isinstance(cause, InUseError):
        return errno.EIO
    return cause.errno or errno.EIO
