"""A coroutine driven from one system call to the next, outside of any task: the event loop's way around costs more than
a fast disk's sync.

It waits by `waiting.py` alone. Each call is tried inline, for a moment (`offload.py`); should that not do, a task takes
over with `finish` where it stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import trio

from qedfuse.host.host_call import HostCall
from qedfuse.host.offload import Worker, idle_worker, offload
from qedfuse.host.waiting import Way, way


class Stepper:
    """The coroutine begins at once.

    `call` is what it waits for, None when it has ended; `advance` with what came of the call goes on to the next one
    and raises what the coroutine raises. `run_inline` and `finish` do both.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.call: HostCall | None = None
        self._coroutine = coroutine
        self._worker: Worker | None = None
        self._step(partial(coroutine.send, None))

    def advance(self, result: object, error: BaseException | None = None) -> None:
        if error is not None:
            self._step(partial(self._coroutine.throw, error))
        else:
            self._step(partial(self._coroutine.send, result))

    def _step(self, go: Callable[[], Any]) -> None:
        self.call = None
        token = way.set(Way.STEPPED)
        try:
            call = go()
        except StopIteration:
            return
        finally:
            way.reset(token)
        if not isinstance(call, HostCall):
            self._coroutine.close()
            raise RuntimeError("a coroutine needs an event loop")
        self.call = call

    def run_inline(self, until: float) -> bool:
        """Go on for as long as each call is done in a moment, and begin none after `until` (`time.monotonic`). Returns
        whether the coroutine has ended; if not, `finish` must be awaited. Raises what it raises."""
        while self.call is not None:
            self._worker = idle_worker(self.call) if time.monotonic() < until else None
            if self._worker is None or not self._worker.attempt(self.call):
                return False
            try:
                result = self._worker.finish()
            except Exception as error:
                self.advance(None, error)
            else:
                self.advance(result)
        return True

    async def finish(self) -> None:
        """All the rest, whatever is cancelled. Raises what the coroutine raises."""
        with trio.CancelScope(shield=True):
            while self.call is not None:
                worker, self._worker = self._worker, None
                try:
                    result = await (worker.finish_later() if worker else offload(self.call))
                except Exception as error:
                    self.advance(None, error)
                else:
                    self.advance(result)
