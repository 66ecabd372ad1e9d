"""Whether a chain that is open is still what its names lead to."""

from __future__ import annotations

import os
from functools import partial
from itertools import pairwise

from qedfuse.chain.backing import open_backing_file
from qedfuse.chain.policy import ANY_BACKING, BackingPolicy
from qedfuse.host.file_id import FileId
from qedfuse.host.lookups import cannot_tell, look
from qedfuse.layers.layer import Layer, layers_of


async def names_are_current(top: Layer, policy: BackingPolicy = ANY_BACKING) -> bool:
    """Whether the names of a chain's backing files still lead to the open files; yes if that cannot be told."""
    try:
        return await look(partial(_names_are_current, top, policy))
    except OSError as error:
        if not cannot_tell(error):
            raise
        return True


def _names_are_current(top: Layer, policy: BackingPolicy) -> bool:
    for layer, below in pairwise(layers_of(top)):
        try:
            storage = open_backing_file(layer.path, below.path, policy)
        except OSError as error:
            if cannot_tell(error):
                raise
            return False
        try:
            if FileId.of(storage.stat()) != FileId.of(below.storage.stat()):
                return False
        finally:
            os.close(storage.fileno())
    return True
