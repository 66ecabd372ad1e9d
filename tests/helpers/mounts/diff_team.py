"""The processes that write to a raw file, each to its own part, and what they have done and found."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.qemu.cli import ROOT, environment

#: Seconds in which an order must have been carried out.
_PATIENCE = 150.0


class Member:
    """One process; see `diff_worker`."""

    def __init__(self, *words: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.mounts.diff_worker", *map(str, words)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def tell(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self, deadline: float) -> dict[str, Any]:
        """The answer to the oldest order that has none yet."""
        assert self._process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            ready = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, f"worker {self._process.pid} hangs: {_where(self._process.pid)}"
            part = os.read(self._process.stdout.fileno(), 1 << 20)
            assert part, f"worker {self._process.pid} has ended: {self._process.wait()}"
            line += part
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(_PATIENCE)


def _where(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stack").read_text()
    except OSError as error:
        return str(error)


@dataclass
class Team:
    """`size`: the raw file's. `deeds` and `sectors` (compared) count what all have done."""

    members: list[Member]
    size: int
    deeds: int = 0
    sectors: int = 0
    mixed: dict[int, int] = field(default_factory=dict)

    def close(self) -> None:
        for member in self.members:
            member.close()

    def begin(self, **order: Any) -> None:
        for member in self.members:
            member.tell(**order)

    def finish(self, *, may_fail: bool = False) -> list[str]:
        """Wait for all of them. Fails if anything reads as it must not. Returns the calls that failed: none, unless
        they may."""
        deadline = time.monotonic() + _PATIENCE
        answers = [member.hear(deadline) for member in self.members]
        for number, answer in enumerate(answers):
            self.deeds += answer["deeds"]
            self.sectors += answer["sectors"]
            self.mixed[number] = answer["mixed"]
        self.size = answers[0]["size"]
        wrong = [f"worker {number}: {text}" for number, answer in enumerate(answers) for text in answer["wrong"]]
        assert not wrong, f"{len(wrong)} faults:\n" + "\n".join(wrong[:12])
        errors = [f"worker {number}: {each['error']}" for number, each in enumerate(answers) if "error" in each]
        assert may_fail or not errors, errors
        return errors

    def all(self, **order: Any) -> list[str]:
        self.begin(**order)
        return self.finish()

    def compare(self, shift: int) -> None:
        """Each looks at the part of another, `shift` further."""
        for number, member in enumerate(self.members):
            member.tell(do="compare", other=(number + shift) % len(self.members), size=self.size)
        self.finish()

    def stories(self, sectors: list[int]) -> str:
        """What they have done to these sectors."""
        self.begin(do="story", sectors=sectors)
        deadline = time.monotonic() + _PATIENCE
        told = [(number, member.hear(deadline)["wrong"]) for number, member in enumerate(self.members)]
        return "\n".join(f"worker {number}, {text}" for number, texts in told for text in texts)


@contextmanager
def team(model: Path, *, count: int, tail: int, capacity: int, size: int) -> Iterator[Team]:
    """So many processes, which do not outlive the block."""
    writers = Team([], size)
    try:
        for number in range(count):
            writers.members.append(Member(model, number, count, tail, capacity))
        yield writers
    finally:
        writers.close()
