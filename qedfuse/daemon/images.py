"""The images of a mount: those that the command line names, open from the beginning, and those of its directories."""

from __future__ import annotations

import trio

from qedfuse.chain.opening import open_for_use
from qedfuse.chain.staleness import names_are_current
from qedfuse.daemon.config import MountConfig
from qedfuse.fuse.mounted_image import MountedImage
from qedfuse.fuse.options import MountOptions
from qedfuse.fuse.tree import Tree
from qedfuse.qed.image import Image

#: Seconds that an image of a SOURCE directory stays open after its last use.
LINGER = 0.5


class MountImages:
    """`tree`: what the mount shows. `nursery`: where open images are kept; they must be closed before it ends."""

    def __init__(self, config: MountConfig, options: MountOptions, nursery: trio.Nursery) -> None:
        self._config = config
        self._options = options
        self._nursery = nursery
        self.tree = Tree(config.directories, self._make)

    async def open_named(self) -> bool:
        """Open those of the command line. Returns whether anything in the mount may be written. Raises what
        `open_for_use` and `make_writable` raise; what is open by then is in the tree."""
        writable = bool(self._config.directories)
        for path in self._config.images:
            mounted = self._make(path, in_directory=False)
            async with await mounted.acquire(to_write=True) as image:
                writable |= image.writable
            try:
                if self._config.over_file:
                    self.tree.set_root(mounted)
                else:
                    self.tree.add(mounted)
            except OSError:
                await mounted.close()
                raise
        return writable

    def _make(self, path: str, *, in_directory: bool = True) -> MountedImage:
        async def open_it(path: str) -> Image:
            return await open_for_use(
                path,
                read_only=True,
                fixed_size=self._options.fixed_size,
                policy=self._options.policy,
                in_directory=in_directory,
                isolated=True,
            )

        return MountedImage(
            path,
            open_it,
            self._nursery,
            read_only=self._options.read_only,
            linger=LINGER,
            is_current=lambda image: names_are_current(image, self._options.policy),
        )
