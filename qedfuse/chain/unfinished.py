"""The journal of a conversion in place: what is under way with a file, until the conversion has come to its end.

`FILE.qedfuse-journal` lies beside FILE (beside what a symbolic link leads to), and is there from before the first
change of FILE until after the last one. `apply.py` in tools/in_place/ has the rulebook. Whatever opens an image looks
for it:

- for writing, it is refused: the conversion counts on what it has found;
- as qed or qcow2, it can be read: at any time the file is a whole image of the format that its first sector tells;
- as raw, it is refused, too: the file is longer than the disk.

What the journal holds is not to be trusted: it may have been put there by whoever made the image.
"""

from __future__ import annotations

import base64
import binascii
import errno
import json
import os
import stat
from collections.abc import Container
from dataclasses import dataclass
from enum import Enum

from qedfuse.chain.format_probe import FORMATS
from qedfuse.errors import FormatError, QedfuseError
from qedfuse.host.durable_note import read_note, remove_note, write_note
from qedfuse.host.image_lock import lock
from qedfuse.sizes import MAX_OFFSET, SECTOR_SIZE
from qedfuse.text import describe

SUFFIX = ".qedfuse-journal"
_VERSION = 1
#: A journal has less than 2 KiB.
_MAX_BYTES = 16 << 10


class UnfinishedError(QedfuseError):
    """A conversion in place is under way: the file must not be used as asked."""

    default_errno = errno.EBUSY


class Step(Enum):
    """How far a conversion is, durably: the rulebook's steps that may have begun.

    TAIL: something is being written behind the old image, and FILE is that one. SWITCH: all of that is durable, and
    FILE is the old image or the new one, as its first sector tells. FINISH: FILE is the new one.
    """

    TAIL = "tail"
    SWITCH = "switch"
    FINISH = "finish"


@dataclass(frozen=True)
class Unfinished:
    """What a journal says. `source` and `target` are formats, `old_size` is the file's size before (bytes), and
    `grown_size` that with what has been reserved behind it, or from step SWITCH on the size at the switch; `old_first`
    and `new_first` are the first sector (512 bytes) of the old and the new image, of which the latter is known from
    step SWITCH on."""

    source: str
    target: str
    old_size: int
    grown_size: int
    old_first: bytes
    new_first: bytes | None = None
    step: Step = Step.TAIL

    def __str__(self) -> str:
        return f"a conversion in place from {self.source} to {self.target}"

    def encode(self) -> bytes:
        """The journal's content."""
        fields = {
            "version": _VERSION,
            "source": self.source,
            "target": self.target,
            "old_size": self.old_size,
            "grown_size": self.grown_size,
            "old_first": _to_text(self.old_first),
            "new_first": None if self.new_first is None else _to_text(self.new_first),
            "step": self.step.value,
        }
        return json.dumps(fields, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, content: bytes, path: str) -> Unfinished:
        """From a journal's content. `path` is for messages. Raises FormatError."""
        try:
            fields = json.loads(content)
            if not isinstance(fields, dict):
                raise ValueError("no json object")
            version = fields.pop("version")
            if version != _VERSION:
                raise ValueError(f"version {str(version)[:20]!r}, and this qedfuse knows {_VERSION} only")
            step = Step(fields.pop("step"))
            new_first = fields.pop("new_first")
            found = cls(
                source=_format(fields.pop("source")),
                target=_format(fields.pop("target")),
                old_size=_size(fields.pop("old_size")),
                grown_size=_size(fields.pop("grown_size")),
                old_first=_sector(fields.pop("old_first")),
                new_first=None if new_first is None else _sector(new_first),
                step=step,
            )
            fits = found.source != found.target and found.old_size <= found.grown_size
            if fields or not fits or (found.new_first is None) != (step is Step.TAIL):
                raise ValueError("its fields do not fit together")
        except KeyError as error:
            raise _invalid(path, f"{error} is missing") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise _invalid(path, str(error)[:100]) from None
        return found


def _invalid(path: str, reason: str) -> FormatError:
    return FormatError(
        path, f"is no valid journal of a conversion in place ({reason}); if none is under way, remove it"
    )


def _to_text(sector: bytes) -> str:
    return base64.b64encode(sector).decode()


def _sector(value: object) -> bytes:
    try:
        sector = base64.b64decode(str(value), validate=True)
    except binascii.Error:
        raise ValueError("a sector that is no base64") from None
    if len(sector) != SECTOR_SIZE:
        raise ValueError(f"a sector of {len(sector)} bytes")
    return sector


def _format(value: object) -> str:
    if value not in FORMATS:
        raise ValueError("an unknown format")
    return str(value)


def _size(value: object) -> int:
    if type(value) is not int or not 0 < value <= MAX_OFFSET:
        raise ValueError("a size out of range")
    return value


def changed_meanwhile(found: Unfinished, path: str) -> UnfinishedError:
    """For a file at `path` that is not as a conversion has left it."""
    message = f"{found} was under way, and another program has changed the file since then"
    return UnfinishedError(path, f"{message}; if the file is in order, remove its journal ({SUFFIX})")


def journal_path(fd: int, path: str) -> str:
    """Where the journal of an open file is, or would be; it was opened as `path`. No name is looked up."""
    try:
        real = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # no /proc
        real = ""
    return (real if os.path.isabs(real) else os.path.realpath(path)) + SUFFIX


def read_journal(path: str, owners: Container[int] | None = None) -> Unfinished | None:
    """What the journal at `path` says, None if there is none. `owners`: see `read_note`. Blocks. Raises FormatError,
    OSError."""
    content = read_note(path, _MAX_BYTES + 1, owners)
    if content is None:
        return None
    if len(content) > _MAX_BYTES:
        raise _invalid(path, "it is too long")
    return Unfinished.decode(content, path)


def find_unfinished(fd: int, path: str) -> Unfinished | None:
    """What is under way with an open file, that was opened as `path`. Blocks. Raises FormatError, OSError."""
    return read_journal(journal_path(fd, path))


def refuse_unfinished(fd: int, path: str) -> None:
    """For a file that is opened for writing, or as a raw disk. Blocks. Raises UnfinishedError if a conversion is under
    way with it; FormatError, OSError if that cannot be told."""
    found = find_unfinished(fd, path)
    if found is not None:
        raise UnfinishedError(path, way_out(found, path))


def claim_for_writing(fd: int, path: str) -> None:
    """A writer's locks for an open file that is to be changed with no chain around it. Blocks. Raises as
    `image_lock.lock` and `refuse_unfinished` do."""
    lock(fd, path, writable=True)
    refuse_unfinished(fd, path)


def refuse_unfinished_at(path: str) -> None:
    """As `refuse_unfinished`, for a file that is not open and need not exist."""
    found = read_journal(os.path.realpath(path) + SUFFIX)
    if found is not None:
        raise UnfinishedError(path, way_out(found, path))


def describe_unfinished(fd: int, path: str) -> str | None:
    """What is under way with an open file, for a person who only looks at it; or that its journal cannot be read.
    Blocks. Raises OSError."""
    try:
        found = find_unfinished(fd, path)
    except (FormatError, PermissionError) as error:
        return describe(error, path)
    return None if found is None else way_out(found, path)


def way_out(found: Unfinished, path: str) -> str:
    """What is under way with the file at `path`, and what to do, for a message."""
    command = f"qedfuse convert --in-place -f {found.source} -O {found.target}"
    if found.step is Step.FINISH:
        return f"{found} is nearly done; finish it with `{command} {path}`"
    return f"{found} is under way; finish it with `{command} {path}`, or take it back with `{command} --undo {path}`"


class Journal:
    """The journal at `path` of a file with a `mode` and an `owner` (a user id; None: this user), for the one process
    that has the file's locks. All calls block, and raise OSError."""

    def __init__(self, path: str, mode: int, owner: int | None = None) -> None:
        self._path = path
        self._mode = stat.S_IMODE(mode) & 0o666  # it holds a part of the file
        self._owners = {0, os.geteuid()} if owner is None else {0, os.geteuid(), owner}

    def read(self) -> Unfinished | None:
        """See `read_journal`. What it says is done to the file, so that it must be from one who may write to that."""
        return read_journal(self._path, self._owners)

    def write(self, unfinished: Unfinished) -> None:
        """Durable on return. If it fails, the journal is as before or as it was to be."""
        write_note(self._path, unfinished.encode(), self._mode)

    def remove(self) -> None:
        """Durable on return."""
        remove_note(self._path)
