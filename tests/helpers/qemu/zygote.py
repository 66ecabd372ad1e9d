"""Runs many commands in processes of their own, each measured and limited, without loading the interpreter anew.

A small process imports qedfuse once and forks for every command. What comes back is what a shell would see, and more:
seconds, peak memory, and the files that the command opened by name (as Python's audit events tell, which see every
`open`).

    with Zygote() as zygote:
        done = zygote.run("info", "--untrusted", path)                 # the command line
        done = zygote.run(path, function="tests.helpers.NAME:function")   # function([path]) -> exit code
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from tests.helpers.qemu.cli import Name, environment

#: What a command may reserve before it is refused more memory: to protect the machine, far above what is tested.
ADDRESS_SPACE = 4 << 30
COMMAND_LINE = "qedfuse.cli.main:main"
CRASHED = 70
_PRELOAD = ["host.offload", "cli.main", "cli.info", "cli.map", "cli.check"]
_PRELOAD += ["chain.opening", "layers.mapping", "check.check"]


class Done(NamedTuple):
    """`code`: negative for a signal (-SIGALRM: it took longer than its limit); `CRASHED` for an exception. `seconds` of
    processor time, `memory` in bytes at its peak. `out` is its first mebibyte."""

    code: int
    out: str
    err: str
    seconds: float
    memory: int
    opened: list[str]


class Zygote:
    """The process, from entering the block to leaving it."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.helpers.qemu.zygote"]
        self._process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)

    def run(self, *args: Name, function: str = COMMAND_LINE, limit: float = 60) -> Done:
        """`limit` in seconds of wall time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"args": [os.fspath(arg) for arg in args], "function": function, "limit": limit}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))


def _main() -> None:
    for name in _PRELOAD:
        importlib.import_module(f"qedfuse.{name}")
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)


def _fork(job: dict[str, Any]) -> dict[str, Any]:
    function = _load(job["function"])
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as opened:
        pid = os.fork()
        if pid == 0:
            _child(function, job, out, err, opened)
        _pid, status, usage = os.wait4(pid, 0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": _text(out),
            "err": _text(err),
            "seconds": usage.ru_utime + usage.ru_stime,
            "memory": usage.ru_maxrss << 10,
            "opened": sorted(set(filter(None, _text(opened).split("\0")))),
        }


def _load(name: str) -> Callable[[list[str]], int]:
    module, function = name.split(":")
    found: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return found


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(1 << 20).decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode()


def _child(
    function: Callable[[list[str]], int], job: dict[str, Any], out: IO[bytes], err: IO[bytes], opened: IO[bytes]
) -> None:
    code = CRASHED
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        devnull = os.open(os.devnull, os.O_RDONLY)
        os.dup2(devnull, 0)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        def note(event: str, args: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(args[0], (str, bytes)):
                os.write(opened.fileno(), os.fsencode(args[0]) + b"\0")

        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, job["limit"])
        sys.addaudithook(note)
        code = function(job["args"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    _main()
