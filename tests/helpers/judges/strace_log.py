"""What strace says that was done to some files, in order.

One log of all threads of all traced processes is more exact than any clock: strace is told of each system call before
it is begun and again when it has ended, and only then does the caller go on. So of two calls, of which one is made
because the other has returned (in the same thread, in another one, or in another process), the log has them in this
order; if they overlap in the log, they may have done so.

    4711 pwrite64(5<PATH>, "BYTES", 512, 4096) = 512
    4711 fdatasync(5<PATH> <unfinished ...>          other lines follow
    4711 <... fdatasync resumed>) = 0

Source: strace(1).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Every call that can change a file by its descriptor, or make it durable. Those that `_understand` does not know are
#: there to be noticed.
CALLS = (
    "write,writev,pwrite64,pwritev,pwritev2,ftruncate,fallocate,fsync,fdatasync,msync,syncfs,copy_file_range,sendfile,"
    "splice"
)
#: No write may be cut short in the log.
OPTIONS = ("-f", "-qq", "-a", "1", "-y", "-v", "-xx", "-s", str(64 << 20), "-e", f"trace={CALLS}")

_KEEP_SIZE = "FALLOC_FL_KEEP_SIZE"
_CLEARING = {f"{_KEEP_SIZE}|FALLOC_FL_PUNCH_HOLE", f"{_KEEP_SIZE}|FALLOC_FL_ZERO_RANGE"}

_BEGUN = re.compile(rb"(\w+)\(\d+<([^>]*)>")
_RESUMED = re.compile(rb"<\.\.\. \w+ resumed>")
_STRING = re.compile(rb'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_UNFINISHED = b" <unfinished ...>"


@dataclass(eq=False)
class Call:
    """A system call on the file `path`. Bytes; `size` of a hole, or the file's new one."""

    path: str
    kind: str  # write, truncate, punch, synced: as crash.Change
    offset: int = 0
    data: bytes = b""
    size: int = 0


@dataclass
class Event:
    """A call was begun, or (`ended`) has returned successfully."""

    call: Call
    ended: bool = False


def read_log(path: Path) -> list[Event]:
    """All that happened. Fails if a call failed, was cut off, or is not understood."""
    return list(_events(path))


def _events(path: Path) -> Iterator[Event]:
    running: dict[bytes, Call] = {}
    for line in path.read_bytes().splitlines():
        thread, text = line.split(maxsplit=1)
        if text.startswith((b"+++", b"---")):  # an exit, a signal
            continue
        resumed = _RESUMED.match(text)
        if resumed:
            call = running.pop(thread)
            text = text[resumed.end() :]
        elif text.endswith(_UNFINISHED):
            running[thread] = call = _understand(text.removesuffix(_UNFINISHED))
            yield Event(call)
            continue
        else:
            call = _understand(text.rpartition(b") = ")[0].rstrip())
            yield Event(call)
        result = text.rpartition(b" = ")[2].decode()
        assert result == str(len(call.data)), f"a {call.kind} of {call.path} returned {result}, not {len(call.data)}"
        yield Event(call, ended=True)
    assert not running, "calls that never ended"


def _understand(text: bytes) -> Call:
    """A call without its closing parenthesis and its result."""
    begun = _BEGUN.match(text)
    assert begun, f"what is {text[:200]!r}?"
    name, path = begun[1].decode(), os.fsdecode(_plain(begun[2]))
    rest = text[begun.end() :]
    if name in ("fsync", "fdatasync"):
        return Call(path, "synced")
    if name == "ftruncate":
        return Call(path, "truncate", size=_numbers(rest)[0])
    if name == "fallocate":
        flags = rest.split(b", ")[1].decode()
        assert flags in _CLEARING, flags
        offset, size = _numbers(rest.partition(flags.encode())[2])
        return Call(path, "punch", offset, size=size)
    assert name in ("pwrite64", "pwritev", "pwritev2"), f"{name} is not expected"
    strings = list(_STRING.finditer(rest))
    assert not any(string[2] for string in strings), "strace has cut data off"
    offset = _numbers(re.split(rb'["\]]', rest)[-1])[1]  # behind a length or a number of pieces
    return Call(path, "write", offset, b"".join(_plain(string[1]) for string in strings))


def _plain(text: bytes) -> bytes:
    return bytes.fromhex(text.replace(b"\\x", b"").decode())


def _numbers(text: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb"\d+", text)]
