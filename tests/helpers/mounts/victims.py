"""Processes that write to a mount until they are stopped, or until its daemon is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.helpers.judges.ledger import Ledger
from tests.helpers.mounts import acknowledging
from tests.helpers.mounts.mounts import Mounted, find_daemon, wait_for_exit

KINDS = ("fsync", "direct", "dsync", "mmap")

_PATIENCE = 60.0


class Victim:
    """A running script. `hear` gets every line that it says, in a thread; `failure` is the errno that ended it."""

    def __init__(self, script: str, *words: object, hear: Callable[[str], None], changed: threading.Condition) -> None:
        self.failure: int | None = None
        self._hear = hear
        self._changed = changed
        self._process = subprocess.Popen(
            [sys.executable, script, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                if line.startswith("e "):
                    self.failure = int(line[2:])
                else:
                    self._hear(line)
                self._changed.notify()

    @property
    def ended(self) -> bool:
        return self.failure is not None or self._process.poll() is not None

    def terminate(self) -> None:
        self._process.terminate()

    def join(self) -> None:
        """Wait until it has ended, because it was told to or because its mount is dead."""
        self._process.wait(_PATIENCE)
        self._listener.join(_PATIENCE)
        assert self._process.stderr is not None
        complaint = self._process.stderr.read()
        # SIGBUS: a page of a map that could not be read. SIGTERM: it had not come to its handler yet.
        expected = (0, -signal.SIGBUS, -signal.SIGTERM)
        assert not complaint and self._process.returncode in expected, (self._process.returncode, complaint)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(_PATIENCE)
        self._listener.join(_PATIENCE)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()


class Victims:
    """Several at once, and the condition that is notified when one has said something."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._victims: list[Victim] = []

    def start(self, script: str, *words: object, hear: Callable[[str], None]) -> None:
        self._victims.append(Victim(script, *words, hear=hear, changed=self._changed))

    def write(self, raw: Path, ledger: Ledger, *, holes: bool) -> None:
        """One writer of each kind."""
        version = ledger.next_version
        for number, kind in enumerate(KINDS):
            words = (raw, kind, ledger.seed, version, number, len(KINDS), int(holes))
            self.start(acknowledging.__file__, *words, hear=ledger.listener(number, mapped=kind == "mmap"))

    def wait_for(self, count: Callable[[], int], more: int) -> None:
        """Until what is counted has grown by so many. Fails if one of them ends before."""
        with self._changed:
            target = count() + more
            self._changed.wait_for(lambda: count() >= target or any(each.ended for each in self._victims), _PATIENCE)
            assert count() >= target, [(each.ended, each.failure) for each in self._victims]

    def watch(self, seconds: float) -> None:
        """Let them work for so long. Fails as soon as one of them ends."""
        with self._changed:
            failed = self._changed.wait_for(lambda: any(each.ended for each in self._victims), seconds)
            assert not failed, self.failures

    def stop(self) -> None:
        """Tell them to end between two writes, and wait for it. None may have failed."""
        for victim in self._victims:
            victim.terminate()
        self.join()
        assert self.failures == set()

    def join(self) -> None:
        for victim in self._victims:
            victim.join()

    @property
    def failures(self) -> set[int]:
        """The errnos that ended them."""
        return {victim.failure for victim in self._victims if victim.failure is not None}

    def close(self) -> None:
        with ExitStack() as stack:
            for victim in self._victims:
                stack.callback(victim.close)


@contextmanager
def victims() -> Iterator[Victims]:
    """Victims that do not outlive the block."""
    all_of_them = Victims()
    try:
        yield all_of_them
    finally:
        all_of_them.close()


def kill_daemon(mount: Mounted) -> None:
    """SIGKILL the daemon and wait until it is gone: the kernel has then aborted the connection."""
    kill_process(find_daemon(mount.point))


def kill_process(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for_exit(pid)
