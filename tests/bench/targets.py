"""What is compared: each target shows a disk image as a flat file, or is the flat file itself."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path


def run(*command: str | Path, timeout: float = 600, fine: tuple[int, ...] = (0,)) -> str:
    """Run a command; its output. Raises RuntimeError with what it said if its exit code is none of the fine ones."""
    words = [str(word) for word in command]
    done = subprocess.run(words, check=False, text=True, capture_output=True, timeout=timeout)
    if done.returncode not in fine:
        raise RuntimeError(f"{' '.join(words[:4])}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Target(ABC):
    """One way to serve an image. `name` heads its column; `tool` does what is done offline, where it has its own."""

    name: str
    tool: tuple[str, ...] = ()
    image_format = "qed"

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch / re.sub(r"[^\w.-]+", "-", self.name)  # a comma would end QEMU's option
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def available() -> str | None:
        """Why this target cannot run here, or None."""
        return None

    @property
    def image(self) -> Path:
        return self.scratch / f"disk.{self.image_format}"

    def create(self, size: str, backing: Path | None = None) -> None:
        """A fresh image; with a raw backing file, an overlay of it."""
        self.image.unlink(missing_ok=True)
        overlay = ["-b", str(backing), "-F", "raw"] if backing else []
        run("qemu-img", "create", "-q", "-f", self.image_format, *overlay, self.image, size)

    def fill(self, source: Path) -> None:
        """A fully allocated image with the contents of a raw file."""
        self.image.unlink(missing_ok=True)
        run("qemu-img", "convert", "-f", "raw", "-O", self.image_format, source, self.image)

    @abstractmethod
    def mount(self) -> Path:
        """Serve the image; the flat file, when it is usable."""

    @abstractmethod
    def unmount(self) -> None:
        """Stop serving; returns when the image is closed."""

    @property
    def pid(self) -> int | None:
        """The process that serves, if there is one."""
        return self._process.pid if self._process else None

    def _mountpoint(self) -> Path:
        mountpoint = self.scratch / "mnt.raw"
        mountpoint.touch()
        return mountpoint

    def _start(self, *command: str | Path) -> None:
        self._process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)

    def _wait_for_size(self, path: Path, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not (path.stat().st_size and os.path.ismount(path)):
            if time.monotonic() > deadline or (self._process and self._process.poll() is not None):
                raise RuntimeError("did not come up")
            time.sleep(0.005)

    def _stop(self, path: Path, by_signal: bool) -> None:
        assert self._process is not None
        try:
            if by_signal:
                self._process.send_signal(signal.SIGTERM)
            else:
                run("fusermount3", "-u", path)
            code = self._process.wait(30)
        finally:
            self._process.kill()
            self._process = None
            subprocess.run(["fusermount3", "-q", "-u", "-z", path])  # it may have died
        if code not in (0, -signal.SIGTERM):
            raise RuntimeError(f"ended with exit code {code}")


class RawFile(Target):
    """The upper bound: the file system itself. A copy-on-write row is a write into an allocated copy."""

    name = "raw file"
    image_format = "raw"

    def create(self, size: str, backing: Path | None = None) -> None:
        self.image.unlink(missing_ok=True)
        if backing:
            shutil.copyfile(backing, self.image)
        else:
            run("truncate", "-s", size, self.image)

    def fill(self, source: Path) -> None:
        shutil.copyfile(source, self.image)

    def mount(self) -> Path:
        return self.image

    def unmount(self) -> None:
        pass


def iothreads(count: int) -> tuple[list[str], str]:
    """The daemon's options that make iothreads, and what an export's say to run in them."""
    names = [f"thread{number}" for number in range(count)]
    objects = [word for name in names for word in ("--object", f"iothread,id={name}")]
    if count == 1:  # an older QEMU knows no list
        return objects, f",iothread={names[0]}"
    return objects, "".join(f",iothread.{number}={name}" for number, name in enumerate(names))


class StorageDaemon(Target):
    name = "qemu-storage-daemon"
    command: tuple[str, ...] = ("qemu-storage-daemon",)
    tool: tuple[str, ...] = ("qemu-img",)
    threads = 0  # the export's iothreads; 0: it runs in the main loop

    @staticmethod
    def available() -> str | None:
        return None if shutil.which("qemu-storage-daemon") else "qemu-storage-daemon is not installed"

    def mount(self) -> Path:
        path = self._mountpoint()
        objects, used = iothreads(self.threads)
        self._start(
            *self.command,
            *objects,
            *("--blockdev", f"driver=file,node-name=file,filename={self.image}"),
            *("--blockdev", "driver=qed,node-name=disk,file=file"),
            *("--export", f"type=fuse,id=export,node-name=disk,mountpoint={path},writable=on{used}"),
        )
        self._wait_for_size(path)
        return path

    def unmount(self) -> None:
        self._stop(self.scratch / "mnt.raw", by_signal=True)  # after fusermount3 -u it would spin


class NbdFuse(Target):
    name = "nbdfuse"

    @staticmethod
    def available() -> str | None:
        missing = [name for name in ("nbdfuse", "qemu-nbd") if not shutil.which(name)]
        return f"{' and '.join(missing)} not installed" if missing else None

    def mount(self) -> Path:
        path = self._mountpoint()
        socket_command = ["qemu-nbd", "-t", "-f", "qed", str(self.image)]
        self._start("nbdfuse", path, "--socket-activation", *socket_command)
        self._wait_for_size(path)
        return path

    def unmount(self) -> None:
        self._stop(self.scratch / "mnt.raw", by_signal=False)


class QedFuse(Target):
    name = "qedfuse"
    tool: tuple[str, ...] = (sys.executable, "-m", "qedfuse")
    options: tuple[str, ...] = ()

    def mount(self) -> Path:
        path = self._mountpoint()
        self._start(*QedFuse.tool, "mount", "-f", *self.options, self.image, path)
        self._wait_for_size(path)
        return path

    def unmount(self) -> None:
        run(*QedFuse.tool, "umount", self.scratch / "mnt.raw")
        assert self._process is not None
        self._process.wait(30)
        self._process = None


class QedFusePython(QedFuse):
    name = "qedfuse --no-fastpath"
    tool = ()
    options = ("--no-fastpath",)


ALL: tuple[type[Target], ...] = (RawFile, StorageDaemon, NbdFuse, QedFuse, QedFusePython)
