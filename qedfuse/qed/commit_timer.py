"""When an image commits without being asked: soon after a change, and once more when it has been idle. What a commit
does, and in which order, is decided in `commit.py`."""

from __future__ import annotations

import logging

import trio

from qedfuse.qed.commit import Committer

#: Seconds until a change of the tables is written without a flush.
COMMIT_DELAY = 1.0
#: Seconds without a change after which NEED_CHECK is cleared (QEMU's time, too).
IDLE_DELAY = 5.0

_log = logging.getLogger("qedfuse")


async def commit_in_time(committer: Committer, path: str) -> None:
    """Commit soon after a change, clear NEED_CHECK when idle; until cancelled, or until there can be no more commits.

    Errors stay: the tables remain dirty and the next flush reports what is wrong.
    """
    complaint = ""
    while True:
        await committer.dirty.wait()
        committer.dirty = trio.Event()
        changes = committer.changes
        try:
            await committer.mark_early()
            await trio.sleep(COMMIT_DELAY)
            await committer.write_back()
            complaint = ""
            if committer.marked:
                with trio.move_on_after(IDLE_DELAY - COMMIT_DELAY):
                    await committer.dirty.wait()
                if committer.changes == changes:
                    await committer.clean()
        except OSError as error:
            if committer.ended:
                return
            if complaint != (complaint := error.strerror or str(error)):
                _log.warning("%s: cannot write tables yet: %s", path, complaint)
            await trio.sleep(COMMIT_DELAY)
            committer.dirty.set()
