"""Opening an image for use: locks, backing chain, check after a crash, commit timer, and an orderly end."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypedDict, Unpack

import trio

from qedfuse.chain.chain import Chain
from qedfuse.chain.format_probe import QED
from qedfuse.chain.policy import ANY_BACKING, BackingPolicy
from qedfuse.chain.recovery import recover
from qedfuse.errors import UsageError
from qedfuse.host.offload import to_its_end
from qedfuse.qed.header import Header
from qedfuse.qed.image import Image

_log = logging.getLogger("qedfuse")


class Options(TypedDict, total=False):
    """Of `open_for_use`, which says what they mean."""

    read_only: bool
    fixed_size: bool
    share: bool
    policy: BackingPolicy
    in_directory: bool
    isolated: bool


async def open_for_use(
    path: str | os.PathLike[str],
    *,
    read_only: bool = False,
    fixed_size: bool = False,
    share: bool = False,
    policy: BackingPolicy = ANY_BACKING,
    in_directory: bool = False,
    isolated: bool = False,
) -> Image:
    """An image that is open until its `close` is awaited, by whatever task, and commits on a timer until then.

    As `library.open_image`, for this package. `in_directory`: only the directory of `path` can be trusted; its last
    name was found there, may be a symbolic link, and is followed as a backing file's name is. `isolated`: this process
    has other tasks, which must go on when a server that has one of the files does not answer.

    The timer belongs to the event loop and not to a nursery: what cancels the caller must not end it in the middle of a
    commit, whose outcome closing needs. Cancelled while it opens, nothing stays open.
    """
    path = os.fspath(path)
    if share and not read_only:
        raise UsageError(path, "without locks (-U) an image can only be opened read-only")
    chain = Chain(share, policy, isolated=isolated)
    async with chain.closed_on_error():
        await chain.open_top(path, QED, writable=not read_only, in_directory=in_directory)
        storage, header = chain.links[0]
        assert isinstance(header, Header)
        if not read_only:
            header = await recover(storage, header)
        image = Image(storage, header, chain.build_backing(), writable=not read_only, fixed_size=fixed_size)
    trio.lowlevel.spawn_system_task(_run_timer, image)
    return image


async def _run_timer(image: Image) -> None:
    try:
        await image.run_background()
    except Exception as error:
        _log.critical("%s: the timer has ended, only a flush commits now", image.path, exc_info=error)


@asynccontextmanager
@trio.lowlevel.enable_ki_protection  # not of the block
async def open_image(path: str | os.PathLike[str], **options: Unpack[Options]) -> AsyncIterator[Image]:
    """An image that is open for the block; see `open_for_use`.

    No call may be in progress when the block is left: none is waited for. An error of closing goes to the log if the
    block has failed.
    """
    image = await open_for_use(path, **options)
    try:
        yield image
    except BaseException:
        try:
            await to_its_end(image.close)
        except OSError as error:
            _log.error("%s: closing failed: %s", image.path, error)
        raise
    await to_its_end(image.close)
