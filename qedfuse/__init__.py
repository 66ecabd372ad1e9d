"""qedfuse: QED disk images as flat raw files, read and write.

The engine is a library too, on trio:

    async with qedfuse.open_image("disk.qed") as image:
        data = await image.read(0, 512)

See `library.py`. What is named here is loaded when it is first used: `qedfuse info` needs neither trio nor pyfuse3, and
starts without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qedfuse.errors import (
    CorruptError,
    FormatError,
    InUseError,
    QedfuseError,
    ReadOnlyError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from qedfuse.chain.policy import BackingPolicy
    from qedfuse.layers.runs import Kind, Run
    from qedfuse.library import Image, open_image

__version__ = "0.1.0"

__all__ = [
    "BackingPolicy",
    "CorruptError",
    "FormatError",
    "Image",
    "InUseError",
    "Kind",
    "QedfuseError",
    "ReadOnlyError",
    "Run",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "open_image",
]

_LAZY = {
    "BackingPolicy": "qedfuse.chain.policy",
    "Image": "qedfuse.library",
    "Kind": "qedfuse.layers.runs",
    "Run": "qedfuse.layers.runs",
    "open_image": "qedfuse.library",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
