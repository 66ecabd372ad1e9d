"""QEMU of another system's root, such as `tests/bench/qemu_root.sh` makes, as further peers.

Its programs are started by that root's own dynamic loader with that root's libraries, so that it may be newer than this
system; no chroot is needed, and all see the same images and mountpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tests.bench.targets import StorageDaemon, Target, run

#: From which version on an export takes a list of iothreads, as far as was tried: 10.0 refuses it, 11.1 takes it.
_LIST_OF_THREADS = (11,)


class Peer(StorageDaemon):
    """`qemu-storage-daemon` of a root; a version has a class of its own for each number of iothreads."""

    version: tuple[int, ...]

    @staticmethod
    def available() -> str | None:
        return None


def program(root: Path, name: str) -> tuple[str, ...]:
    """The command that runs a program of a root. Raises FileNotFoundError where that has none, or no loader."""
    binary = root / "usr" / "bin" / name
    if not binary.exists():
        raise FileNotFoundError(f"{binary}: no such file")
    loaders = [path for place in ("lib64", "lib") for path in sorted((root / place).glob("ld-linux*.so.*"))]
    if not loaders:
        raise FileNotFoundError(f"{root}: no dynamic loader in it")
    libraries = [str(path) for place in ("lib", "usr/lib") for path in sorted((root / place).glob("*-linux-gnu*"))]
    return str(loaders[0]), "--library-path", ":".join(libraries), str(binary)


def parse_version(said: str) -> tuple[int, ...]:
    """The version in what a program of QEMU says to --version. Raises ValueError if there is none."""
    found = re.search(r"\bversion (\d+(?:\.\d+)+)", said)
    if not found:
        raise ValueError(f"no version in {said[:60]!r}")
    return tuple(int(number) for number in found[1].split("."))


def peers(root: Path) -> list[type[Peer]]:
    """The daemon of a root with one iothread, and with two if it can have them. Raises OSError, RuntimeError or
    ValueError without one."""
    root = root.resolve()
    daemon, image_tool = program(root, "qemu-storage-daemon"), program(root, "qemu-img")
    found = parse_version(run(*daemon, "--version"))

    class OneThread(Peer):
        name = f"QEMU {dotted(found)}, 1 thread"
        version = found
        command = daemon
        tool = image_tool
        threads = 1

    class TwoThreads(OneThread):
        name = f"QEMU {dotted(found)}, 2 threads"
        tool = ()  # the same
        threads = 2

    return [OneThread, TwoThreads] if found >= _LIST_OF_THREADS else [OneThread]


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def newest(kinds: Iterable[type[Target]]) -> tuple[str, list[str]]:
    """The newest QEMU among those of roots, and the names of all that are of its version; none, if there are none."""
    of_roots = [kind for kind in kinds if issubclass(kind, Peer)]
    latest = max((kind.version for kind in of_roots), default=())
    return f"QEMU {dotted(latest)}", [kind.name for kind in of_roots if kind.version == latest]
