"""One image that is mounted and killed again and again, and the judge of what each kill left: QEMU and ourselves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.mounts.guests import assert_clean, qemu_check, run
from tests.helpers.mounts.modes import Mode
from tests.helpers.mounts.mounts import Mounted, is_mounted, mounted, need_fuse, wait_until
from tests.helpers.mounts.victims import Victims, kill_daemon, kill_process
from tests.helpers.qemu.cli import TIMEOUT, environment, qedfuse

SEED = int(os.environ.get("QEDFUSE_KILL_SEED") or random.SystemRandom().randrange(1 << 32))

#: In each slow test.
KILLS = int(os.environ.get("QEDFUSE_KILLS") or 10)

#: Gives a test the argument `overlay`.
IMAGES = pytest.mark.parametrize("overlay", [False, True], ids=["plain", "overlay"])

#: Cluster size and table size. Small ones make many tables.
GEOMETRIES = (("4k", "2"), ("4k", "4"), ("64k", "4"), ("256k", "2"))


class Killable:
    """One image, on its way from kill to kill. It appears as `raw`; `words` are what `qedfuse mount` is given to show
    it there, the mountpoint last."""

    def __init__(self, directory: Path, mode: Mode, rnd: random.Random, *, overlay: bool) -> None:
        need_fuse()
        self.mode = mode
        self.overlay = overlay
        self.random = rnd
        self.directory = directory
        self.image = directory / "disk.qed"
        self.raw = directory / "disk.raw"
        self.words: tuple[str | Path, ...] = (self.image, self.raw)
        self.kills = 0

    @property
    def point(self) -> Path:
        """The mountpoint."""
        return Path(self.words[-1])

    @contextmanager
    def mounted(self) -> Iterator[Mounted]:
        with mounted(*self.mode, *self.words) as mount:
            yield mount
        assert "Traceback" not in mount.text() and "internal error" not in mount.text(), mount.text()

    def kill(self, mount: Mounted, writers: Victims) -> None:
        """Kill it, and wait for the writers to learn of it (the kernel has several errnos for that)."""
        assert not writers.failures, writers.failures
        kill_daemon(mount)
        self.kills += 1
        writers.join()

    def bury(self, mount: Mounted) -> None:
        """After a kill: unmount what is dead, as a user would."""
        if is_mounted(self.point):
            done = mount.umount()
            assert done.code == 1 and "its daemon does not answer" in done.err, done

    def kill_closing(self, mount: Mounted) -> None:
        """Kill it while it flushes and closes the image, between the end of the mount and its own."""
        pid = mount.pid()
        with subprocess.Popen(
            [sys.executable, "-m", "qedfuse", "umount", str(self.point)], env=environment(), stderr=subprocess.PIPE
        ) as umount:
            # It makes all durable first, for which a busy disk needs its time.
            wait_until(lambda: not is_mounted(self.point) or umount.poll() is not None, TIMEOUT)
            assert not is_mounted(self.point), umount.stderr and umount.stderr.read()
            time.sleep(self.random.uniform(0, 0.02))
            try:
                kill_process(pid)
                self.kills += 1
            except ProcessLookupError:
                pass
            umount.wait(TIMEOUT)
        self.bury(mount)

    def kill_opening(self) -> None:
        """Kill a daemon that is just opening (perhaps repairing) the image, mounting it, or has done so."""
        command = [sys.executable, "-m", "qedfuse", "mount", "-f", *map(str, (*self.mode, *self.words))]
        with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as daemon:
            time.sleep(self.random.uniform(0.15, 0.5))
            daemon.kill()
        assert daemon.returncode == -signal.SIGKILL, daemon.returncode
        while is_mounted(self.point):
            subprocess.run(["umount", "-l", str(self.point)], check=True, timeout=TIMEOUT)
        self.kills += 1

    def judge(self, verify: Callable[[], None]) -> None:
        """What a crash has left: QEMU's opinion first, then ours, and they must be the same. `verify` looks into the
        raw file, mounted, and may change it.

        Clusters that were written but not committed yet have leaked; where NEED_CHECK says so, opening gives them back.
        """
        crashed = self.directory / "crashed.qed"
        run("cp", "--sparse=always", self.image, crashed)
        marked = json.loads(run("qemu-img", "info", "-f", "qed", "--output=json", crashed))["dirty-flag"]
        assert not (marked and self.overlay)
        if self.overlay:
            assert qemu_check(crashed).get("corruptions", 0) == 0, f"{crashed}: corrupt before any repair"
        else:
            subprocess.run(["qemu-img", "check", "-q", "-r", "all", str(crashed)], check=False, timeout=TIMEOUT)
        theirs = self._flat(crashed)
        if self.random.random() < 0.3:
            self.kill_opening()
        with self.mounted():
            assert self.raw.read_bytes() == theirs, f"{crashed}: QEMU reads it differently"
            verify()
            ours = self.raw.read_bytes()
        assert_clean(self.image, leaks=not marked)
        assert self._flat(self.image) == ours, f"{self.image}: QEMU reads it differently"
        if not marked and self.random.random() < 0.5:
            done = qedfuse("check", "-r", "leaks", self.image)
            assert done.code == 0, done
            assert_clean(self.image)

    def _flat(self, image: Path) -> bytes:
        flat = self.directory / "flat.raw"
        run("qemu-img", "convert", "-f", "qed", "-O", "raw", image, flat)
        return flat.read_bytes()


class Case(Killable):
    """A new image under a file mount, over a raw base if it is an overlay. `base`: its first contents."""

    def __init__(
        self, directory: Path, mode: Mode, size: int, *, overlay: bool, geometry: tuple[str, str] | None = None
    ) -> None:
        super().__init__(directory, mode, random.Random(f"{SEED}/{mode}/{overlay}/{geometry}"), overlay=overlay)
        self.raw.touch()
        cluster, table = geometry or self.random.choice(GEOMETRIES)
        options = ["-o", f"cluster_size={cluster},table_size={table}"]
        base = b""
        if overlay:
            base = self.random.randbytes(size * 3 // 4)
            (directory / "base.raw").write_bytes(base)
            options += ["-b", str(directory / "base.raw"), "-F", "raw"]
        run("qemu-img", "create", "-q", "-f", "qed", *options, self.image, str(size))
        self.base = base.ljust(size, b"\0")
        print(f"QEDFUSE_KILL_SEED={SEED}: {self.image}, clusters of {cluster}, tables of {table}")
