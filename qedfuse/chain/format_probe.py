"""Which format a file is, from its first bytes. Pure.

Only for files whose format is not stated: a guest can write any magic at the start of a raw disk.

Source: each format's specification; QEMU's block drivers (`*_probe`) for what counts as a match.
"""

from __future__ import annotations

from qedfuse.errors import UnsupportedError
from qedfuse.layers.qcow2.header import MAGIC as QCOW_MAGIC
from qedfuse.qed.header import MAGIC as QED_MAGIC

#: As many bytes of the start as `probe_format` looks at.
PROBE_BYTES = 512

RAW = "raw"
QED = "qed"
QCOW2 = "qcow2"
FORMATS = (RAW, QED, QCOW2)

#: Formats that are no raw disks and that qedfuse does not read: offset, magic, name as in QEMU.
_OTHERS = (
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
)


def probe_format(head: bytes, path: str) -> str:
    """`raw`, `qed` or `qcow2`. `head` is the file's first PROBE_BYTES, or all of a shorter file.

    Raises UnsupportedError for another known format. `path` is for messages.
    """
    if head.startswith(QED_MAGIC):
        return QED
    if head.startswith(QCOW_MAGIC) and len(head) >= 8:
        version = int.from_bytes(head[4:8], "big")
        if version >= 2:
            return QCOW2
        if version == 1:
            raise _unsupported(path, "qcow (version 1)")
    name = other_format(head)
    if name is not None:
        raise _unsupported(path, name)
    return RAW


def other_format(head: bytes) -> str | None:
    """The format, neither raw nor one that qedfuse reads, that a file is of; None if there is none. A file may be of
    two: some magics are not at its start."""
    return next((name for offset, magic, name in _OTHERS if head.startswith(magic, offset)), None)


def _unsupported(path: str, name: str) -> UnsupportedError:
    return UnsupportedError(
        path, f"looks like a {name} image, which qedfuse does not read; if it is a raw disk, state its format as raw"
    )
