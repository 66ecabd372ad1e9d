"""What a mount is told at its start."""

from __future__ import annotations

from dataclasses import dataclass

from qedfuse.fuse.options import MountOptions


@dataclass(frozen=True)
class MountConfig:
    """What to mount where. All paths are absolute, and `mountpoint` has no symbolic links in it.

    `images` and `directories` are the sources. `over_file`: the mountpoint is a regular file, to show the one image.
    `fastpath`: requests may be answered by the native filter where there is one.
    """

    images: tuple[str, ...]
    directories: tuple[str, ...]
    mountpoint: str
    over_file: bool
    options: MountOptions
    fastpath: bool

    @property
    def sources(self) -> tuple[str, ...]:
        return self.images + self.directories
