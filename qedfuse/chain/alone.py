"""An image that is opened by itself, without an event loop: loading one takes longer than reading many images.

What has a backing file is not opened here: that one's name may lead to a host that does not answer (`lookups.py`).
"""

from __future__ import annotations

from qedfuse.chain.format_probe import PROBE_BYTES, QED, RAW, probe_format
from qedfuse.chain.unfinished import UnfinishedError, describe_unfinished
from qedfuse.host.closing import closed_on_error
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.image_lock import lock
from qedfuse.host.storage import read
from qedfuse.host.waiting import NeedsEventLoopError
from qedfuse.layers.layer import Layer
from qedfuse.layers.raw import RawLayer
from qedfuse.qed.header_io import read_header
from qedfuse.qed.layer import QedLayer


async def open_alone(path: str, format: str | None, *, share: bool) -> Layer:
    """As `open_layer`, a raw file or a QED image without a backing file. Raises NeedsEventLoopError for any other."""
    storage = FileStorage.open(path, False)
    async with closed_on_error(storage):
        if not share:
            lock(storage.fileno(), path, writable=False)
        if format is None:
            format = probe_format(await read(storage, 0, min(PROBE_BYTES, storage.size())), path)
        if format == RAW:
            unfinished = describe_unfinished(storage.fileno(), path)
            if unfinished is not None:  # it is longer than the disk
                raise UnfinishedError(path, unfinished)
            return RawLayer.open(storage)
        header = await read_header(storage) if format == QED else None
        if header is None or header.has_backing_file:
            raise NeedsEventLoopError(path)
        return QedLayer(storage, header, None, lenient=header.needs_check, pool=None)
