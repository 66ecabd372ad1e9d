"""Disks of all kinds, with a model of what each reads as, on a host that tells what is durable and fails on demand."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

import trio

from qedfuse import library
from qedfuse.layers.disk import Disk
from qedfuse.qed.image import Image
from tests.helpers.doubles.crash import CrashStorage
from tests.helpers.doubles.ram import Chaos, RamFile
from tests.helpers.images.images import (
    POOL,
    TINY,
    Chain,
    assert_sound,
    contents,
    new_chain,
    on_device,
    open_chain,
    raw_file,
    read_header,
)
from tests.helpers.judges.expect import raises_errno
from tests.helpers.judges.history import Clock

SIZE = 40 * 4096 + 512
CLUSTER = TINY.cluster_size
_DEVICE = 2 << 20

#: The library's image does not tell its version.
ENGINE = ["image", "image, chaotic", "image over a file", "image on a device"]
KINDS = [*ENGINE, "library"]


class Host(CrashStorage):
    """`fails`: with this errno every sync does. `full`: with this errno every write does."""

    fails = 0
    full = 0

    async def sync(self) -> None:
        if self.fails:
            raise OSError(self.fails, os.strerror(self.fails))
        await super().sync()

    def apply_write(self, offset: int, data: bytes) -> None:
        if self.full:
            raise OSError(self.full, os.strerror(self.full))
        super().apply_write(offset, data)


@dataclass
class Opened:
    """`disk` reads as `model` (a test keeps it so), of which `below` is the backing file's. `host` has its file."""

    disk: Disk
    model: bytearray
    below: bytes
    host: Host
    chain: Chain

    async def expect_model(self) -> None:
        assert self.disk.size == len(self.model)
        assert await self.disk.read(0, len(self.model)) == self.model

    def durable(self) -> RamFile:
        """The host's file, as a loss of power at this moment leaves it at worst."""
        return self.host.crash_point_now().least()

    async def expect_durable(self) -> None:
        assert await contents(self.chain, self.durable()) == self.model


@asynccontextmanager
async def opened(
    kind: str, *, writable: bool = True, fixed_size: bool = False, leaks: bool = False
) -> AsyncIterator[Opened]:
    """A disk of the kind. In the end it is closed in good order, durably, and reads as it did before, unless a sync has
    failed: then it says so."""
    below = random.Random(1).randbytes(SIZE // 2) if kind == "image over a file" else b""
    chain = await new_chain(SIZE, below=[(raw_file(below), "raw")] if below else [])
    if "device" in kind:
        chain.file = on_device(chain.file, _DEVICE)
    host = Host("ram", chain.file, Clock(), writable=writable, chaos=Chaos(7) if "chaotic" in kind else None)
    if writable:
        image = await open_chain(chain, host, fixed_size=fixed_size)
    else:
        image = Image(host, read_header(chain.file), chain.layer_below(), writable=False, pool=POOL)
    try:
        disk = cast("Disk", library.Image(image)) if kind == "library" else image
        yield Opened(disk, bytearray(below.ljust(SIZE, b"\0")), below, host, chain)
        seen = await disk.read(0, disk.size)
        if image.failed:
            with raises_errno(errno.EIO):
                await image.close()
            return
        await image.close()
    finally:
        with trio.CancelScope(shield=True):
            await host.close()
    await assert_sound(chain.file, leaks=leaks)
    assert await contents(chain) == seen, "closing changes what is read"
    assert await contents(chain, host.crash_point_now().least()) == seen, "what was closed is not durable"
    expect_the_same_below(chain.below, below)


def expect_the_same_below(layers: Sequence[tuple[RamFile, str]], content: bytes) -> None:
    for file, _format in layers:
        assert file.read(0, file.size) == content, "a backing file is never written"
