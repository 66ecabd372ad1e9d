"""A request of the kernel, as the fast path hands it over, that notes what is replied."""

from __future__ import annotations

import trio

from qedfuse.fuse.bypass import Request
from qedfuse.host.storage import Buffer


class NotedRequest:
    """`replies`: errno, data or offset, in order. `invalidated`: ranges. For handlers of one event loop."""

    node = 1

    def __init__(self) -> None:
        self.replies: list[int | bytes] = []
        self.invalidated: list[tuple[int, int]] = []
        self._replied = trio.Event()

    async def replied(self) -> int | bytes:
        """The reply, which must be the only one."""
        await self._replied.wait()
        [reply] = self.replies
        return reply

    def reply(self, error: int = 0, /) -> None:
        self._note(error)

    def reply_data(self, data: Buffer, /) -> None:
        self._note(bytes(data))

    def reply_offset(self, offset: int, /) -> None:
        self._note(offset)

    def reply_open(self, fh: int, /, *, direct: bool, keep_cache: bool) -> bool:
        raise AssertionError("no OPEN")

    def invalidate(self, offset: int, size: int, /) -> None:
        self.invalidated.append((offset, size))

    def _note(self, reply: int | bytes) -> None:
        self.replies.append(reply)
        self._replied.set()


async def no_opener(_request: Request, _node: int, _flags: int) -> None:
    """For handlers that get no OPEN."""
    raise AssertionError
