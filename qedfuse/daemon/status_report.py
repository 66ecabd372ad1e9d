"""What the daemon of a mount is doing, for `qedfuse status`."""

from __future__ import annotations

import os
from itertools import islice
from typing import TYPE_CHECKING, Any

from qedfuse.daemon.config import MountConfig
from qedfuse.fuse.operations import Operations
from qedfuse.fuse.options import MountOptions
from qedfuse.fuse.tree import Tree

if TYPE_CHECKING:
    from qedfuse.fuse.fastpath import FastPath

#: How many hidden images are listed.
_LISTED = 100


def report(
    config: MountConfig, options: MountOptions, tree: Tree, operations: Operations, fastpath: FastPath | None
) -> dict[str, Any]:
    """Sizes in bytes; the counters count requests of the kernel; "pending-images" says how many are on their way open
    or closed, and may be locked. `options` are those in force."""
    paths = {node.mounted.path for node in tree.nodes}
    return {
        "pid": os.getpid(),
        "mountpoint": config.mountpoint,
        "sources": list(config.sources),
        "read-only": options.read_only,
        "direct-io": options.direct_io,
        "fastpath": fastpath is not None and fastpath.answers,
        "fastpath-counters": fastpath.counters if fastpath else {},
        "images": [node.mounted.status() for node in tree.nodes if node.mounted.opened],
        "pending-images": sum(node.mounted.open and not node.mounted.opened for node in tree.nodes),
        "unopened-images": operations.unopened.status(paths),
        "hidden-images": [
            {"filename": path, "hidden-by": by} for path, by in islice(tree.sources.hidden.items(), _LISTED)
        ],
        "requests": operations.counts.totals(),
    }
