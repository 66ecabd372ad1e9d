"""The `qedfuse` command with one word more for its daemon: "replace" exchanges the image that is the mount's root.

`python -m` this module and arguments. The image is replaced in turns: closed and opened anew, by a copy of its file
with another name, and by itself. Every now and then a request takes long, as on a slow disk.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import trio

import qedfuse.fuse.fastpath  # isort: skip  # before pyfuse3 is loaded
import qedfuse.daemon.daemon
from qedfuse.chain.opening import open_for_use
from qedfuse.cli.main import main
from qedfuse.daemon.control_server import Call
from qedfuse.daemon.daemon import Daemon
from qedfuse.fuse.mounted_image import MountedImage
from qedfuse.host.storage import Buffer
from qedfuse.qed.image import Image


class ReplacingDaemon(Daemon):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._control._commands["replace"] = self.replace
        self._replaced = 0

    async def replace(self, _call: Call) -> dict[str, Any]:
        """The answer: `path`, where the image's file is by now."""
        assert self._tree.root is not None
        mounted = self._tree.root.mounted
        ways = (_reopen, _move, _reopen, _keep)
        self._replaced += 1
        async with mounted.quiesced():
            await ways[self._replaced % len(ways)](mounted)
        return {"path": mounted.path}


async def _keep(mounted: MountedImage) -> None:
    """By itself."""


async def _reopen(mounted: MountedImage) -> None:
    assert mounted.opened is not None
    await mounted.opened.close()
    mounted.replace(await open_for_use(mounted.path, isolated=True))


async def _move(mounted: MountedImage) -> None:
    """By a copy, which is open before the old one is closed."""
    old = mounted.opened
    assert old is not None
    path = Path(old.path)
    copy = path.with_name("even.qed" if path.name == "odd.qed" else "odd.qed")
    await trio.to_thread.run_sync(shutil.copyfile, path, copy)
    mounted.replace(await open_for_use(copy, isolated=True))
    await old.close()
    await trio.to_thread.run_sync(path.unlink)


def make_slow() -> None:
    """One in eight of the engine's reads and writes that are not done at once."""
    read, write = Image.read, Image.write
    chance = random.Random(1)

    async def pause() -> None:
        if chance.random() < 1 / 8:
            await trio.sleep(0.01)

    async def slow_read(self: Image, offset: int, size: int) -> bytes | bytearray:
        await pause()
        return await read(self, offset, size)

    async def slow_write(self: Image, offset: int, data: Buffer) -> None:
        await pause()
        await write(self, offset, data)

    Image.read, Image.write = slow_read, slow_write  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    make_slow()
    qedfuse.daemon.daemon.Daemon = ReplacingDaemon  # type: ignore[misc]
    sys.exit(main())
