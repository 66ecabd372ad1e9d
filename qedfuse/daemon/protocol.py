"""What is said on the control socket of a mount. Pure: no socket, no event loop.

A connection is for one request, a JSON object in one line; the answers are JSON objects, one a line:

    {"version": 2, "command": NAME, "arguments": {...}, "detached": false}

    ->  any number of objects with "more": true, and then one without it, the last
    ->  or {"version": 2, "error": text}, if the request is refused: only refusals have a version
    ->  or {"failed": text} as the last one, if the command fails

    status      {"pid": ..., "mountpoint": ..., "images": [...], ...}
    flush       {"error": null | text, "unwritten": null | text}, when all that was completed is durable; "unwritten" is
                what may be written yet (no space), "error" is all that went wrong
    wait        {"waiting": true}, and when all is closed {"closed": true, "error": null | text};
                if it cannot be, for some time: {"closed": false, "error": text}

What a client has asked for ends when it goes away (closes the connection, not only its half of it), unless it is
`detached`. The daemon believes nothing that it is sent, and reads no more than `MAX_REQUEST` bytes.

Versions. A request that names none is of version 1, which had neither arguments nor refusals with a version, and the
same commands: it is answered as ever. One of a later version than the daemon's is refused, and so is an unknown
command. A daemon of version 1 says {"error": "unknown command"} to what it does not know, without a version, and that
is how it is told from the others. A mount may be older or younger than the command that talks to it by any number of
releases: what an answer has beyond what its reader knows is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

VERSION = 2
#: Bytes of a request, and of an answer (it lists the images).
MAX_REQUEST = 4096
MAX_ANSWER = 64 << 20

_UNKNOWN = "unknown command"


class Refused(Exception):
    """A request that is not carried out, and why."""


class Request(NamedTuple):
    """`arguments`: as the client has sent them; of any types, to be checked by what uses them."""

    command: str
    arguments: Mapping[str, Any] = {}
    detached: bool = False

    def encode(self) -> bytes:
        return encode({"version": VERSION, **self._asdict()})


def decode(line: bytes) -> Request:
    """A request. Raises Refused."""
    try:
        message = json.loads(line)
        version = message.get("version", 1)
        command, arguments = message.get("command"), message.get("arguments", {})
        detached = message.get("detached", False)
    except (ValueError, AttributeError, RecursionError):
        raise Refused("not a request") from None
    if not isinstance(version, int) or version > VERSION:
        raise Refused(f"it speaks version {VERSION} of the protocol, and is older than this command")
    if not isinstance(command, str):
        raise Refused(_UNKNOWN)
    if not isinstance(arguments, dict) or not isinstance(detached, bool):
        raise Refused("not a request")
    return Request(command, arguments, detached)


def unknown() -> Refused:
    """No command has this name."""
    return Refused(_UNKNOWN)


def refusal(error: Refused) -> dict[str, Any]:
    """The answer."""
    return {"version": VERSION, "error": str(error)}


def why_refused(answer: Mapping[str, Any]) -> str | None:
    """Whether an answer is a refusal, and why."""
    reason = answer.get("error")
    if "version" in answer and isinstance(reason, str):
        return f"its daemon refuses: {reason}"
    if reason == _UNKNOWN:
        return "its daemon is older than this command, and does not know it"
    return None


def failure(text: str) -> dict[str, Any]:
    """The last answer of a command that fails."""
    return {"failed": text}


def why_failed(answer: Mapping[str, Any]) -> str | None:
    """Whether an answer is of a command that has failed, and why."""
    reason = answer.get("failed")
    return reason if isinstance(reason, str) else None


def encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
