"""A file becomes an image of another format where it is: what is refused, which conversion it is, and how it ended."""

from __future__ import annotations

import errno
import os

from qedfuse.chain.format_probe import PROBE_BYTES, QCOW2, QED, RAW, other_format, probe_format
from qedfuse.chain.unfinished import Journal, Unfinished, UnfinishedError, journal_path, way_out
from qedfuse.errors import QedfuseError, UnsupportedError
from qedfuse.host.closing import closing
from qedfuse.host.file_storage import FileStorage
from qedfuse.host.image_lock import lock
from qedfuse.host.other_users import refuse_other_users
from qedfuse.host.storage import read
from qedfuse.progress import Report
from qedfuse.qed.header import Header
from qedfuse.qed.header_io import read_fields
from qedfuse.tools.in_place.apply import InPlace
from qedfuse.tools.in_place.plan import Converter, Wanted
from qedfuse.tools.in_place.qcow2_to_qed import Qcow2ToQed
from qedfuse.tools.in_place.qed_to_raw import QedToRaw
from qedfuse.tools.in_place.raw_to_qed import RawToQed

#: By the old and the new format.
CONVERTERS: dict[tuple[str, str], Converter] = {
    (RAW, QED): RawToQed(),
    (QED, RAW): QedToRaw(),
    (QCOW2, QED): Qcow2ToQed(),
}


class FileConversion:
    """The conversion in place of the file at `path`; `run` or `take_back` is called once.

    `source` and `target` are formats; None: probed, or what is under way. Of a new QED image `header` is known
    afterwards; `looks_like` is the format that the first bytes of a new raw disk might be taken for. `ending`: how the
    message of an interruption is to end.
    """

    def __init__(self, path: str, *, source: str | None = None, target: str | None = None) -> None:
        self._path = path
        self._source = source
        self._target = target
        self._work: InPlace | None = None
        self.header: Header | None = None
        self.looks_like: str | None = None

    @property
    def ending(self) -> str:
        return self._work.ending if self._work else f"{self._path} is unchanged"

    async def run(self, wanted: Wanted, progress: Report) -> None:
        """Convert it, or go on where a conversion was interrupted. Durable on return.

        Raises OSError, the message of which ends with what is true of the file then, or with what to do; cancelled
        before the switch, the file is as it was.
        """
        try:
            async with closing(FileStorage.open(self._path, True)) as storage:
                journal = self._claim(storage)
                found = journal.read()
                if found is not None:
                    self._refuse_another(found)
                    await self._begin(storage, journal, found.source, found.target).go_on(found, wanted, progress)
                else:
                    source, target = await self._formats(storage)
                    if storage.stat().st_nlink > 1 and not wanted.force:
                        message = "has other names (hard links), which would change their meaning; --force converts it"
                        raise QedfuseError(self._path, message, errno.EMLINK)
                    await self._begin(storage, journal, source, target).begin(wanted, progress)
                await self._look_at_result(storage)
        except OSError as error:
            raise self._with_ending(error) from error

    async def take_back(self) -> None:
        """Make the file what it was before a conversion that was interrupted. Raises as `run` does."""
        try:
            async with closing(FileStorage.open(self._path, True)) as storage:
                journal = self._claim(storage)
                found = journal.read()
                if found is None:
                    raise QedfuseError(self._path, "no conversion in place is under way with it", errno.ENOENT)
                self._refuse_another(found)
                await self._begin(storage, journal, found.source, found.target).take_back(found)
        except OSError as error:
            raise self._with_ending(error) from error

    def _claim(self, storage: FileStorage) -> Journal:
        """Lock the file; its journal is nobody else's then."""
        if storage.fixed:
            message = "is a block device: in place, there is no room behind it for what a conversion needs"
            raise UnsupportedError(self._path, f"{message}; use `qedfuse convert SOURCE TARGET`")
        lock(storage.fileno(), self._path, writable=True)
        refuse_other_users(storage.fileno(), self._path)
        status = storage.stat()
        return Journal(journal_path(storage.fileno(), self._path), status.st_mode, status.st_uid)

    def _refuse_another(self, found: Unfinished) -> None:
        """What is under way must be what is asked for."""
        if self._source not in (None, found.source) or self._target not in (None, found.target):
            raise UnfinishedError(self._path, way_out(found, self._path))

    async def _formats(self, storage: FileStorage) -> tuple[str, str]:
        head = await read(storage, 0, min(PROBE_BYTES, storage.size()))
        source = self._source or probe_format(head, self._path)
        target = self._target or RAW
        if source == target:
            kind = "disk" if source == RAW else "image"
            raise QedfuseError(self._path, f"is a {source} {kind} already; -O says what it is to become", errno.EINVAL)
        if (source, target) not in CONVERTERS:
            command = f"qedfuse convert -f {source} -O {target} {self._path} TARGET"
            raise UnsupportedError(self._path, f"cannot become {target} in place from {source}; use `{command}`")
        return source, target

    def _begin(self, storage: FileStorage, journal: Journal, source: str, target: str) -> InPlace:
        converter = CONVERTERS.get((source, target))
        if converter is None:
            raise UnsupportedError(self._path, f"this qedfuse has no conversion in place from {source} to {target}")
        self._target = target
        self._work = InPlace(storage, journal, converter, source, target)
        return self._work

    async def _look_at_result(self, storage: FileStorage) -> None:
        if self._target == QED:
            self.header = await read_fields(storage)
            return
        head = await read(storage, 0, min(PROBE_BYTES, storage.size()))
        try:
            format = probe_format(head, self._path)
        except UnsupportedError:
            format = other_format(head) or "qcow"
        self.looks_like = None if format == RAW else format

    def _with_ending(self, error: OSError) -> QedfuseError:
        """The same error, with a message that ends as it must."""
        if isinstance(error, QedfuseError):
            return error.reworded(f"{error.message}; {self.ending}")
        reason = (os.strerror(error.errno) if error.errno else str(error)).lower()
        name = error.filename if isinstance(error.filename, str) else self._path
        return QedfuseError(name, f"{reason}; {self.ending}", error.errno)
