"""Errors are values: they can be copied and sent to another process, and are the same there."""

from __future__ import annotations

import copy
import errno
import importlib
import multiprocessing
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import qedfuse
from qedfuse.daemon.launch import MountFailed
from qedfuse.errors import CorruptError, FormatError, QedfuseError, UsageError
from qedfuse.text import describe


def pickled(protocol: int, error: QedfuseError) -> Any:
    return pickle.loads(pickle.dumps(error, protocol))


COPIES: dict[str, Callable[[QedfuseError], QedfuseError]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {number}": partial(pickled, number) for number in range(pickle.HIGHEST_PROTOCOL + 1)},
}


def every_kind() -> list[type[QedfuseError]]:
    """The whole family, whatever module it is in."""
    for module in pkgutil.walk_packages(qedfuse.__path__, "qedfuse."):
        if module.name != "qedfuse.__main__":
            importlib.import_module(module.name)

    def walk(kind: type[QedfuseError]) -> Iterator[type[QedfuseError]]:
        yield kind
        for below in kind.__subclasses__():
            yield from walk(below)

    return [kind for kind in walk(QedfuseError) if kind.__module__.startswith("qedfuse.")]


def make(kind: type[QedfuseError], name: str = "/images/a b.qed") -> QedfuseError:
    """An error of a kind, whatever it is usually made of."""
    error = kind.__new__(kind)
    QedfuseError.__init__(error, name, "is broken\nsomehow", errno.ENOSPC)
    error.exit_code = 77
    error.add_note("a note")
    return error


def parts(error: QedfuseError) -> tuple[object, ...]:
    return (
        type(error),
        error.errno,
        error.strerror,
        error.filename,
        error.path,
        error.message,
        error.exit_code,
        error.args,
        error.__notes__,
        str(error),
        describe(error),
    )


def test_the_family_is_found() -> None:
    kinds = every_kind()
    assert {QedfuseError, FormatError, CorruptError, UsageError, MountFailed} <= set(kinds)
    assert len(kinds) >= 8


@pytest.mark.parametrize("kind", every_kind(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
def test_a_copy_is_the_same(kind: type[QedfuseError], way: Callable[[QedfuseError], QedfuseError]) -> None:
    error = make(kind)
    assert parts(way(error)) == parts(error)


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
def test_of_one_as_it_is_made(way: Callable[[QedfuseError], QedfuseError]) -> None:
    error: QedfuseError = CorruptError(Path("/images/\udcff.qed"), "has a loop", errno.ELOOP)
    copied = way(error)
    assert (copied.errno, copied.filename, str(copied)) == (errno.ELOOP, error.path, str(error))
    assert copied.exit_code == 1
    assert way(UsageError("x", "no")).exit_code == 2
    failed = way(MountFailed("there is no mount", 3))
    assert (type(failed), str(failed), failed.exit_code, failed.filename) == (MountFailed, "there is no mount", 3, None)


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
def test_of_several_at_once(way: Callable[[object], object]) -> None:
    group = ExceptionGroup("two", [make(CorruptError), make(MountFailed)])
    copied = way(group)
    assert isinstance(copied, ExceptionGroup)
    assert [str(error) for error in copied.exceptions] == [str(error) for error in group.exceptions]


def open_in_a_worker(path: str) -> None:
    import trio

    async def main() -> None:
        async with qedfuse.open_image(path):
            pass

    trio.run(main)


def test_a_pool_of_processes_outlives_an_error(tmp_path: Path) -> None:
    path = tmp_path / "none.qed"
    path.write_bytes(b"this is no image")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in range(2):
            with pytest.raises(FormatError) as caught:
                pool.submit(open_in_a_worker, str(path)).result(60)
            assert caught.value.errno == errno.EINVAL
            assert caught.value.filename == str(path)
            assert str(caught.value).startswith(f"{path}: ")
