"""Files that become shorter while they are read.

Reading behind their new end fails. Looking for data there does not: no host tells a hole from what is not there, and it
would be taken for zeroes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from qedfuse.errors import QedfuseError
from qedfuse.layers.layer import Layer, layers_of


@contextmanager
def refuse_shrunk(*tops: Layer | None) -> Iterator[None]:
    """Raise QedfuseError, EIO, if a file of these chains is shorter after the block than before it."""
    sizes = [(layer, layer.storage.size()) for top in tops for layer in layers_of(top)]
    yield
    for layer, size in sizes:
        if layer.storage.size() < size:
            raise QedfuseError(layer.path, "has become shorter while it was read", errno.EIO)
