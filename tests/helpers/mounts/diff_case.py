"""The rounds of the differential test: mounted, worked on by several processes, killed or unmounted, and judged."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.mounts.diff_deeds import PROFILES, rounded
from tests.helpers.mounts.diff_image import DiffImage
from tests.helpers.mounts.diff_team import Team, team
from tests.helpers.mounts.guests import loop_device
from tests.helpers.mounts.mounts import Mounted, abort, wait_for_exit, wait_until
from tests.helpers.mounts.victims import kill_daemon
from tests.helpers.qemu.cli import is_free

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class DiffCase(DiffImage):
    """The rounds."""

    def run(self, rounds: int, count: int) -> None:
        """So many rounds; in each of them every process does `count` things."""
        disk = self.disk
        with team(self.model, count=self.workers, tail=disk.tail, capacity=disk.capacity, size=disk.size) as writers:
            try:
                for number in range(rounds):
                    self._round(writers, number, count)
            finally:
                self.counts.deeds += writers.deeds
                self.counts.sectors += writers.sectors
                self.counts.mixed += sum(writers.mixed.values())
                self.counts.kills += self.kills

    def _round(self, writers: Team, number: int, count: int) -> None:
        how = self.random.choice(("kill", "kill", "kill closing", "terminate", "umount", "umount"))
        how = {0: "umount", 1: "kill"}.get(number, how)
        with self.mounted() as mount:
            with self._loop_device() as loop:
                try:
                    self._open(writers, loop, reopen=how != "terminate")
                    writers.begin(do="work", seed=f"{self.seed}/{number}", count=count, profile=self.profile())
                    if how == "kill":
                        self._kill_them(mount, writers)
                    else:
                        self._let_them_finish(mount, writers, terminate=how == "terminate")
                        if how == "umount" and not loop and self.random.random() < 0.3:
                            self._leave_alone(writers)
                        if how != "umount" or loop or self.random.random() < 0.4:
                            writers.all(do="sync")
                        writers.compare(0 if loop else self.random.randrange(self.workers))
                        writers.all(do="close")
                except BaseException:
                    abort(mount.point)
                    writers.close()  # or the loop device stays
                    raise
            if how == "kill":
                self.bury(mount)
            elif how == "kill closing":
                self.kill_closing(mount)
            elif how == "terminate":
                wait_for_exit(self._pid)
        if how.startswith("kill"):
            self.leaky = True
            self.judge(lambda: self._settle(writers))
            self._compare(writers)
        else:
            writers.all(do="closed", size=rounded(writers.size))
            self._compare(writers)
            self._assert_clean()
            self._by_others(writers)

    def profile(self) -> str:
        return self.random.choice(("all", *PROFILES))

    @contextmanager
    def _loop_device(self) -> Iterator[Path | None]:
        """One on the raw file, which the last process uses instead, in some of the rounds."""
        if self.may_loop and self.random.random() < 0.3:
            options = self.random.choice(([], ["--direct-io=on"]))
            with loop_device(self.raw, *options) as device:
                yield device
        else:
            yield None

    def _open(self, writers: Team, loop: Path | None, *, reopen: bool) -> None:
        order: dict[str, Any] = {"do": "open", "size": writers.size}
        able = self.able + ["reopen"] * reopen
        for number, member in enumerate(writers.members):
            if loop and number == self.workers - 1:
                can = [each for each in able if each in ("holes", "map", "reopen", "rwf")]
                can += ["discard"] * ("holes" in able)
                member.tell(**order, path=str(loop), able=can)
            else:
                source = [str(self.other_raw), str(self.other)] if self.other else None
                member.tell(
                    **order, path=str(self.raw), able=[*able, "file", *["source"] * bool(source)], source=source
                )
        writers.finish()

    def _kill_them(self, mount: Mounted, writers: Team) -> None:
        """In the middle of the work. Whatever they get to hear of it, and of closing their files afterwards."""
        time.sleep(self.random.uniform(0, 0.6) ** 2 * 4)
        kill_daemon(mount)
        self.kills += 1
        writers.finish(may_fail=True)
        writers.begin(do="close")
        writers.finish(may_fail=True)

    def _let_them_finish(self, mount: Mounted, writers: Team, *, terminate: bool) -> None:
        """Meanwhile the daemon is stopped for a moment now and then, or the host's page cache emptied. `terminate`: it
        is told to end, which it does with their last close."""
        self._pid = mount.pid()
        for _ in range(self.random.randrange(4)):
            time.sleep(self.random.uniform(0, 0.2))
            if self.random.random() < 0.7:
                os.kill(self._pid, signal.SIGSTOP)
                try:
                    time.sleep(self.random.uniform(0, 0.3))
                finally:
                    os.kill(self._pid, signal.SIGCONT)
            elif self.random.random() < 0.3 and os.access(DROP_CACHES, os.W_OK):
                DROP_CACHES.write_text("3")
        if terminate:
            os.kill(self._pid, signal.SIGTERM)
        writers.finish()

    def _leave_alone(self, writers: Team) -> None:
        """Everything is closed for a while: what a source directory shows may be closed, too, and is opened again. Or
        QEMU has it in between, and nothing that the kernel remembers is true any more."""
        writers.all(do="close")
        if self.place == "source" and self.disk.qemu and self.random.random() < 0.5:
            wait_until(lambda: is_free(self.image))
            writers.all(do="closed", size=rounded(writers.size))
            self._qemu_writes(writers)
        else:
            time.sleep(self.random.uniform(0, 1.6))
        self._open(writers, None, reopen=True)

    def _settle(self, writers: Team) -> None:
        size = self.raw.stat().st_size
        writers.all(do="open", path=str(self.raw), size=size, able=["reopen"])
        writers.all(do="settle", size=size)
        writers.all(do="close")
