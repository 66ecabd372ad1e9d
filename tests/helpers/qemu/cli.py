"""Running `qedfuse` and QEMU's tools as a user does."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT = 60

Name = str | os.PathLike[str]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def qedfuse(
    *args: Name,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    wrapper: tuple[str, ...] = (),
    preexec: Callable[[], None] | None = None,
) -> Result:
    """Run the command in a process of its own. `wrapper` is a command line that goes in front."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-m", "qedfuse", *map(str, args)],
        cwd=cwd,
        env=environment(env),
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=TIMEOUT,
        check=False,
        preexec_fn=preexec,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def qedfuse_inside(*args: Name) -> Result:
    """Run the command in this process: for those that need neither a locale nor signals of their own."""
    from qedfuse.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return Result(code, out.getvalue(), err.getvalue())


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **(extra or {})}


def tool(*command: object, cwd: Path | None = None, status: tuple[int, ...] = (0,)) -> str:
    """Run a command, which must end with a `status`. Returns its stdout."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=2 * TIMEOUT, check=False)
    assert done.returncode in status, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    assert "failed" not in done.stdout, done.stdout  # qemu-io's exit code is no witness
    return done.stdout


def qemu_img(*words: object, cwd: Path | None = None, status: tuple[int, ...] = (0,)) -> str:
    return tool("qemu-img", *words, cwd=cwd, status=status)


def qemu_io(path: Name, *commands: str, format: str = "qed") -> None:
    """Run `qemu-io` commands on an image; all must succeed."""
    tool("qemu-io", "-f", format, *[word for command in commands for word in ("-c", command)], os.fspath(path))


def new_image(path: Path, size: str = "1M", *options: Name, fill: int | None = None) -> Path:
    """A new QED image, made by QEMU. `options`: of `qemu-img create`; `fill`: the byte in its first 64 KiB."""
    qemu_img("create", "-q", "-f", "qed", *options, path, size)
    if fill is not None:
        qemu_io(path, f"write -P {fill} 0 64k")
    return path


def new_overlay(path: Path, backing: Name) -> Path:
    """A new image of 1 MiB that names a raw backing file, at which nobody looks."""
    return new_image(path, "1M", "-u", "-b", backing, "-F", "raw")


@contextmanager
def qemu_has_open(path: Name) -> Iterator[None]:
    """While the block runs, QEMU has the image open for writing."""
    with subprocess.Popen(
        ["qemu-io", "-f", "qed", os.fspath(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.read(len("qemu-io>")) == "qemu-io>"
            yield
        finally:
            process.stdin.close()
            process.stdout.read()
            process.wait(TIMEOUT)


def is_free(image: Name) -> bool:
    """Whether QEMU could write to an image: nobody has a lock on it."""
    command = ["qemu-io", "-f", "qed", "-c", "read 0 512", os.fspath(image)]
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False).returncode == 0


def one_line(result: Result, code: int, *parts: str) -> None:
    """The command must have failed with `code` and one plain line that contains every part."""
    assert result.code == code, result
    assert result.err.endswith("\n"), result
    assert result.err.count("\n") == 1, result
    assert result.err.startswith("qedfuse"), result
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err, (part, result)
